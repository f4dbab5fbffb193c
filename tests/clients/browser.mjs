// Chromium: the page at /, the article's page, EventSource through cuts, restarts and refusals, and who may do what.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createServer, request as ask } from 'node:http';
import { createRequire } from 'node:module';
import { chromium } from 'playwright-core';
import { Cutter, Server, TARGET, must, newer, snippets, temporary, test, until } from './lib.mjs';

const SHOTS = join(TARGET, 'screenshots');
const POLYFILL = readFileSync(createRequire(import.meta.url).resolve('event-source-polyfill/src/eventsource.js'), 'utf8');

// The article's page as it stands there, and a line for each thing it names: `test`, `error`, `readyState` and `url`.
const article = origin => `
    const source = new EventSource('${origin}/test');

    source.addEventListener('open', () => {
      console.log('Connected');
    }, false);

    source.addEventListener('message', e => {
      console.log(e.data);
    }, false);

    source.addEventListener('pause', e => {
      source.close();
    }, false);

    source.addEventListener('test', e => console.log('test', e.data, e.lastEventId));
    source.addEventListener('pause', e => console.log('pause', e.data, source.readyState));
    source.addEventListener('error', () => console.log('error', source.readyState));
    console.log(source.readyState, source.url);`;

// Another origin than any server's here. Chromium wants it to be on loopback, too: pages from elsewhere need the person's
// leave to reach loopback at all.
const pages = new Map();
const elsewhere = createServer((request, answer) => answer.setHeader('Content-Type', 'text/html').end(pages.get(request.url)));
await new Promise(done => elsewhere.listen(0, '127.0.0.1', done));
elsewhere.unref();
const ELSEWHERE = `http://localhost:${elsewhere.address().port}`;

// Where the article's page may come from.
const PLACES = [
  { name: 'the same origin', flags: [], page: origin => `${origin}/article` },
  { name: 'another origin', flags: [`--allow-origin=${ELSEWHERE}`], page: () => `${ELSEWHERE}/article-by-name` },
  { name: 'anywhere', flags: ['--allow-origin=*'], page: () => `${ELSEWHERE}/article` },
  { name: 'a file', flags: ['--allow-origin=null'], page: () => `file://${join(temporary(), 'article.html')}` },
];

// How many streams of this path the server's log says the browser has closed.
function closed(server, path) {
  const line = /^\w{3}, \d\d .* GMT closed peer=\S+ path="(.*)" reason="the peer (?:closed|reset) the connection" seconds=\S+ events=\d+$/gm;
  return [...server.err.matchAll(line)].filter(match => match[1] === path).length;
}

// What a page keeps of a stream.
const record = address => `
  const got = [], errors = [];
  const source = new EventSource(${JSON.stringify(address)});
  for (const name of ['message', 'gap']) {
    source.addEventListener(name, ({ type, lastEventId: id, data }) => got.push({ type, id, data }));
  }
  source.addEventListener('error', () => errors.push(source.readyState));`;

let chrome;

// A tab at this address of the origin with this script in it, or, without one, with what the server has there.
async function tab(context, url, script) {
  const page = await context.newPage();
  page.said = [];
  page.on('console', message => page.said.push(message.text()));
  page.on('pageerror', error => page.said.push(`error: ${error.message}`));
  if (script !== undefined) {
    const body = `<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script>${script}</script>`;
    if (url.startsWith('file://')) writeFileSync(new URL(url), body);
    else if (url.startsWith(ELSEWHERE)) pages.set(new URL(url).pathname, body);
    else await page.route(url, route => route.fulfill({ contentType: 'text/html', body }));
  }
  await page.goto(url);
  return page;
}

const got = page => page.evaluate('got');

async function has(page, event) {
  let events = [];
  await until(() => `${JSON.stringify(event)} in ${JSON.stringify(events)}`, async () => {
    events = await got(page);
    return events.some(({ id }) => id === event.id);
  });
}

// These events, each once, and no others but gaps.
async function exactly(page, expected) {
  const events = (await got(page)).filter(({ type }) => type !== 'gap');
  must(JSON.stringify(events) === JSON.stringify(expected), `got ${JSON.stringify(events)} and not ${JSON.stringify(expected)}`);
  must(events.every(({ id }, n) => n === 0 || newer(id, events[n - 1].id)), 'not in order');
}

async function withServer(flags, body) {
  await withRunning(await Server.start('--retry=200ms', ...flags), body);
}

async function withRunning(server, body) {
  const cutter = await Cutter.before(server.port);
  const context = await chrome.newContext();
  const origin = `http://127.0.0.1:${cutter.port}`;
  try {
    await body({ server, cutter, context, origin });
  } finally {
    await context.close();
    cutter.close();
    server.kill();
  }
}

// Cuts all, waits until the server has seen it and the browser stands before the door again.
async function away(cutter, server) {
  const before = cutter.opened;
  if (cutter.mode === 'pass') {
    await cutter.begun(); // so that the browser has an id to come back with
    cutter.hold();
    cutter.cut();
  }
  await until('the browser to come back', () => cutter.opened > before || cutter.held.length > 0);
  await server.subscribers(0);
}

async function thePageAtTheRoot({ server, context: other, origin }) {
  const looks = [390, 1280].flatMap(width => ['light', 'dark'].map(colorScheme => ({ width, colorScheme })));
  await Promise.all(looks.map(async ({ width, colorScheme }) => {
    const context = await chrome.newContext({ viewport: { width, height: 844 }, colorScheme });
    const page = await tab(context, origin);
    const shot = part => page.screenshot({ path: join(SHOTS, `${width}-${colorScheme}-${part}.png`), fullPage: true });
    const test = page.locator('#test');
    await test.locator('.log li.event').first().waitFor();
    await shot('running');
    await test.locator('li[data-type="pause"]').waitFor({ timeout: 60_000 });
    const data = await test.locator('li.event .data').allTextContents();
    must(data.reverse().join() === '0,1,2,3,4,5', `the page shows ${data}`);
    must(await test.locator('.state').textContent() === '2 CLOSED', 'pause did not close the stream');

    const topic = `look-${width}-${colorScheme}`;
    await page.locator('#name').fill(topic);
    await page.locator('#choose button').click();
    const shared = page.locator('#topic');
    await until('the topic to be open', async () => await shared.locator('.state').textContent() === '1 OPEN');
    await page.locator('#data').fill('two lines\n  žluťoučký 🐟');
    await page.locator('#publish button').click();
    const row = shared.locator('li[data-type="message"]');
    await row.waitFor();
    must(await row.locator('.data').textContent() === 'two lines\n  žluťoučký 🐟', 'the data came otherwise');
    must((await shared.locator('#answer').textContent()).includes(await row.locator('.id').textContent()), 'another id');
    await page.locator('#type').fill('order');
    await page.locator('#data').fill('{"order": 7, "note": "a-long-word-'.padEnd(300, 'x') + '"}');
    await page.locator('#data').press('Enter');
    await shared.locator('li[data-type="order"]').waitFor();
    await until('the counts', async () => Number(await page.locator('#published').textContent()) >= 2);
    await shot('end');
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    must(wide <= width, `the page is ${wide} wide in a window of ${width}`);

    await test.locator('.reconnect').click();
    await until('a new count', async () => await test.locator('.state').textContent() === '1 OPEN');
    await shared.locator('.close').click();
    await until('the topic to be closed', async () => await shared.locator('.state').textContent() === '2 CLOSED');
    must(!page.said.length, `the console says ${page.said}`);
    await context.close();
  }));

  // Two tabs: what one publishes, both show, in whichever topic both are.
  const [one, two] = await Promise.all([tab(other, origin), tab(other, origin)]);
  const state = page => page.locator('#topic .state').textContent();
  for (const page of [one, two]) {
    await page.locator('#choose button').click();
    await until('an open topic', async () => await state(page) === '1 OPEN');
  }
  await one.locator('#data').fill('for both');
  await one.locator('#publish button').click();
  for (const page of [one, two]) await page.locator('#topic li.event .data', { hasText: 'for both' }).waitFor();

  // Closing a tab ends its streams, and the server says so.
  const topics = closed(server, '/events/news');
  const test = await tab(other, `${origin}/record`, record('/test')); // it takes no notice of the pause
  const tests = closed(server, '/test');
  await test.close();
  await two.close();
  await until(() => `the log in ${server.err}`, () => closed(server, '/events/news') > topics && closed(server, '/test') > tests);
  await one.locator('#data').fill('for one');
  await one.locator('#publish button').click();
  await one.locator('#topic li.event .data', { hasText: 'for one' }).waitFor();
}

// A proxy that has the server under a prefix, as `location /live/ { proxy_pass http://127.0.0.1:3000/; }` does in nginx.
// What is asked for outside of it finds nobody, and is kept.
async function underPrefix(port) {
  const astray = [];
  const proxy = createServer((request, answer) => {
    const { method, headers, url } = request;
    if (!url.startsWith('/live/')) {
      astray.push(url);
      return answer.writeHead(404).end();
    }
    const onward = ask({ port, host: '127.0.0.1', method, headers, path: url.slice('/live'.length) }, from => {
      answer.writeHead(from.statusCode, from.headers);
      answer.flushHeaders();
      from.pipe(answer);
      answer.on('close', () => from.destroy());
    });
    onward.on('error', () => answer.destroy());
    request.pipe(onward);
  });
  await new Promise(done => proxy.listen(0, '127.0.0.1', done));
  proxy.unref();
  return { astray, base: `http://127.0.0.1:${proxy.address().port}/live/`, close: () => (proxy.close(), proxy.closeAllConnections()) };
}

async function thePageUnderAPrefix({ server, context }) {
  const { astray, base, close } = await underPrefix(server.port);
  for (const width of [360, 1280]) {
    const page = await tab(context, `${base}?from=a-link#test`);
    await page.setViewportSize({ width, height: 844 });
    await page.locator('#test li[data-type="pause"]').waitFor({ timeout: 60_000 });
    must(await page.locator('#test .url').textContent() === `${base}test`, 'the stream has another address');
    await page.locator('#data').fill(`from ${width}`);
    await page.locator('#publish button').click();
    await page.locator('#topic li.event .data', { hasText: `from ${width}` }).waitFor();
    await until('the counts', async () => Number(await page.locator('#published').textContent()) >= 1);
    await page.screenshot({ path: join(SHOTS, `prefix-${width}.png`), fullPage: true });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    must(wide <= width, `the page is ${wide} wide in a window of ${width}`);
    // What it gives to copy works as it stands there.
    const commands = (await page.locator('footer pre').textContent()).trim().split('\n');
    const addresses = commands.map(line => line.split(' ').at(-1));
    must(addresses.join() === ['test', 'events/news', 'events/news'].map(path => base + path).join(), `it shows ${commands}`);
    must(!page.said.length, `the console says ${page.said}`);
    await page.close();
  }
  must(!astray.length, `outside of the prefix it asked for ${astray}`);
  close();
}

// One tab is one subscriber until it is asked for more, and publishing shows what was published.
async function oneTabIsOneSubscriber({ server, context, origin }) {
  const page = await tab(context, origin);
  await page.locator('#test li[data-type="pause"]').waitFor({ timeout: 60_000 });
  await server.subscribers(0); // the counting stream was the only one
  must(await page.locator('#topic .state').textContent() === '–', 'the topic was opened');
  must(await page.locator('#topic .reconnect').isDisabled(), 'there is nothing to reconnect');
  await page.locator('#type').fill('order');
  await page.locator('#data').fill('shown here, too');
  await page.locator('#publish button').click();
  await page.locator('#topic li[data-type="order"] .data', { hasText: 'shown here, too' }).waitFor();
  await server.subscribers(1);
  must(!page.said.length, `the console says ${page.said}`);
}

async function theArticle({ server, context, origin }, place) {
  const page = await tab(context, place.page(origin), article(origin));
  await until(() => `the pause: ${page.said}`, () => page.said.some(line => line.startsWith('pause')));
  const said = page.said.map(line => line.replace(/ \d{13}$/, ' MS'));
  const tests = [0, 1, 2, 3, 4].map(n => `test ${n} MS`);
  const wanted = [`0 ${origin}/test`, 'Connected', ...tests, 'pause 5 2'];
  must(said.join('|') === wanted.join('|'), `the page said ${said.join('|')}`);
  await until(() => `the log in ${server.err}`, () => closed(server, '/test') > 0);
}

// Without leave, a page of another origin neither hears a stream nor publishes, by whichever way a page can try.
async function aForeignPage({ server, context, origin }) {
  const page = await tab(context, `${ELSEWHERE}/foreign`, record(`${origin}/events/news`));
  await until('the browser to give up', async () => (await page.evaluate('errors')).includes(2));
  const tries = await page.evaluate(async url => {
    const attempt = options => fetch(url, { method: 'POST', body: 'foreign', ...options }).then(a => a.type, e => e.name);
    const form = Object.assign(document.createElement('form'), { method: 'post', action: url, enctype: 'text/plain', target: 'f' });
    const frame = Object.assign(document.createElement('iframe'), { name: 'f' });
    document.body.append(frame, form);
    const posted = new Promise(done => frame.addEventListener('load', done));
    form.submit();
    await posted;
    return [await attempt({}), await attempt({ mode: 'no-cors' }), await attempt({ method: 'PUT' })];
  }, `${origin}/events/news`);
  must(tries.join() === 'TypeError,opaque,TypeError', `the attempts ended in ${tries}`);
  must(await server.metric('published_total') === 0, 'a foreign page has published');
  await server.publish('for others');
  must((await got(page)).length === 0, 'a foreign page has read');
}

// Allowed by name, it reads with the cookie, and with what only a preflight allows; and it publishes.
async function anAllowedPage({ server, context, origin }) {
  const page = await tab(context, `${ELSEWHERE}/allowed`, '');
  const here = origin.replace('127.0.0.1', 'localhost'); // cookies are of a host, whatever the port
  const first = await page.evaluate(async url => {
    const refused = new EventSource(`${url}?since=earliest`, { withCredentials: true });
    await new Promise(done => refused.addEventListener('error', done));
    document.cookie = 'brooklet_token=reader';
    const answer = await fetch(url, { method: 'POST', body: 'one', headers: { Authorization: 'Bearer writer' } });
    return { state: refused.readyState, id: (await answer.text()).trim() };
  }, `${here}/events/news`);
  must(first.state === 2, 'a stream was opened without a token');
  const heard = await page.evaluate(async url => {
    const source = new EventSource(`${url}?since=earliest`, { withCredentials: true });
    const event = await new Promise(done => source.addEventListener('message', done));
    source.close();
    const headers = { Authorization: 'Bearer reader', 'Last-Event-ID': '1-0', 'Cache-Control': 'no-cache' };
    const reader = (await fetch(url, { headers })).body.pipeThrough(new TextDecoderStream()).getReader();
    let text = '';
    while (!text.includes('data: one')) text += (await reader.read()).value;
    await reader.cancel();
    return event.lastEventId;
  }, `${here}/events/news`);
  must(heard === first.id, `heard ${heard} and not ${first.id}`);
}

// A name of someone else's that leads here: its page would be of the server's own origin, as far as the browser knows.
async function aReboundName({ server, context }) {
  const page = await context.newPage();
  const answer = await page.goto(`http://rebound.test:${server.port}/`);
  must(answer.status() === 403, `the page came with ${answer.status()}`);
  const status = await page.evaluate(async () => (await fetch('/events/news', { method: 'POST', body: 'x' })).status);
  must(status === 403 && await server.metric('published_total') === 0, `publishing ended in ${status}`);
}

async function aScriptInTheData({ server, context, origin }) {
  const page = await tab(context, origin);
  await page.locator('#choose button').click();
  await until('an open topic', async () => await page.locator('#topic .state').textContent() === '1 OPEN');
  const script = '<img src=x onerror="window.ran = 1"><script>window.ran = 2</script>';
  await server.publish(script, { event: 'message' });
  await server.publish('last', { event: '<b onmouseover=alert(1)>' });
  const row = page.locator('#topic li.event .data', { hasText: 'onerror' });
  await row.waitFor();
  must(await row.textContent() === script, 'the data is not shown as text');
  must(await page.evaluate('window.ran') === undefined, 'a script in the data has run');
}

async function aCutStream({ server, cutter, context, origin }) {
  const page = await tab(context, `${origin}/record`, record('/events/news'));
  await away(cutter, server); // before its first event
  const events = [await server.publish('while it was away')];
  cutter.pass();
  await has(page, events.at(-1));
  for (let n = 1; n <= 3; n += 1) {
    events.push(await server.publish(`event ${n}`));
    await has(page, events.at(-1));
    await away(cutter, server);
    events.push(await server.publish(`missed ${n}`));
    cutter.pass();
  }
  await has(page, events.at(-1));
  cutter.cutAfter('half');
  events.push(await server.publish('a half\nand the other'));
  await until('the cut', () => cutter.mode === 'hold');
  await away(cutter, server);
  cutter.pass();
  await has(page, events.at(-1));
  await exactly(page, events);
}

// On the same port and without anything between, so that the browser finds nobody there for a while.
async function aRestart({ context }, ...journal) {
  const first = await Server.start('--retry=200ms', '--log=off', ...journal);
  const page = await tab(context, `http://127.0.0.1:${first.port}/record`, record('/events/news'));
  await first.listening();
  const events = [await first.publish('before')];
  await has(page, events[0]);
  await first.stop();
  const failures = await page.evaluate('errors.length');
  await until('a failed attempt', async () => await page.evaluate('errors.length') > failures);
  // Meanwhile the port may have become another connection's.
  const again = () => Server.start('--retry=200ms', '--log=off', `--listen=127.0.0.1:${first.port}`, ...journal).catch(() => undefined);
  const second = await until('the port', again);
  events.push(await second.publish('after'));
  await has(page, events.at(-1));
  events.push(await second.publish('and on'));
  await has(page, events.at(-1));
  await exactly(page, events);
  const gaps = (await got(page)).filter(({ type }) => type === 'gap').map(({ data }) => JSON.parse(data).after);
  must(gaps.join() === (journal.length ? '' : events[0].id), `gaps after ${gaps}`);
  must(!(await page.evaluate('errors')).includes(2), 'the browser gave up');
  await second.stop();
}

async function noRoom({ server, cutter, context, origin }) {
  const page = await tab(context, `${origin}/record`, record('/events/news'));
  await server.listening();
  const events = [await server.publish('had a place')];
  await has(page, events[0]);
  await away(cutter, server);
  const occupant = await fetch(`http://127.0.0.1:${server.port}/events/news`);
  await server.subscribers(1);
  events.push(await server.publish('no place'));
  cutter.pass();
  await until('it to be rejected twice', async () => await server.metric('sent_away_total') >= 2);
  events.push(await server.publish('still none'));
  await occupant.body.cancel(); // which also keeps it from being collected before
  await has(page, events.at(-1));
  await exactly(page, events);
  must(!(await page.evaluate('errors')).includes(2), 'the browser gave up');
}

// The README's snippet in more tabs than a browser has connections.
async function oneStreamForAllTabs({ server, cutter, context, origin }) {
  const [snippet] = snippets('In a page', 'js');
  const script = `const got = [];\nfunction show({ type, id, data }) { got.push({ type, id, data }); }\n${snippet}`;
  const open = () => tab(context, `${origin}/tabs`, script);
  const pages = [await open()];
  await server.subscribers(1); // so that the first is the leader
  while (pages.length < 8) pages.push(await open());
  const events = [];
  const publish = async data => {
    events.push(await server.publish(data));
    for (const page of pages) await has(page, events.at(-1));
  };
  await publish('to all');
  await publish('to all again');
  must(await server.metric('subscribers') === 1, 'more than one stream');

  // The leader closes, and before another one has its stream an event is published. And again.
  for (const data of ['between leaders', 'and between the next']) {
    cutter.hold();
    await pages.shift().close();
    await server.subscribers(0);
    await until('a new leader', () => cutter.held.length > 0);
    events.push(await server.publish(data));
    cutter.pass();
    for (const page of pages) await has(page, events.at(-1));
    await publish(`after ${data}`);
    must(await server.metric('subscribers') === 1, 'more than one stream');
  }

  // A cut stream under a leader.
  await away(cutter, server);
  events.push(await server.publish('cut'));
  cutter.pass();
  await publish('after the cut');
  for (const page of pages) await exactly(page, events);

  // A tab that has seen nothing comes to lead.
  const fresh = await open();
  const late = await open();
  for (const page of pages.reverse()) await page.close(); // the leader last
  events.push(await server.publish('to the fresh'));
  for (const page of [fresh, late]) await has(page, events.at(-1));
  for (const page of [fresh, late]) {
    const ids = (await got(page)).map(({ id }) => id);
    must(new Set(ids).size === ids.length, `twice in ${ids}`);
  }
}

async function polling({ server, context, origin }, script) {
  const page = await tab(context, `${origin}/poll`, `${script}
    const got = [], ends = [];
    source.addEventListener('message', ({ type, lastEventId: id, data }) => got.push({ type, id, data }));
    source.addEventListener('error', () => ends.push(source.readyState));`);
  await server.listening();
  const events = [];
  for (let n = 1; n <= 3; n += 1) {
    events.push(await server.publish(`event ${n}`), await server.publish(`and another ${n}`));
    await has(page, events.at(-1));
  }
  await exactly(page, events);
  must(await page.evaluate('ends.length') > 0, 'it was no poll');
}

async function theOneFile({ server, cutter, context, origin }) {
  const page = await tab(context, origin);
  const shown = () => page.locator('#log').textContent();
  await until('the pause', async () => (await shown()).includes('pause'));
  const said = (await shown()).split('\n').map(line => line.trim()).filter(line => line);
  const of = (what, state) => `${what} readyState ${state} ${origin}/test`;
  const wanted = [of('open ', 1), ...[0, 1, 2, 3, 4].map(n => of(`test ${n}`, 1)), of('pause 5', 2)];
  must(said.join('|') === wanted.join('|'), `the page shows ${said.join('|')}`);
  must(!page.said.length, `the console says ${page.said}`);
  await until(() => `the log in ${server.err}`, () => / \/test closed: /.test(server.err));
  await page.close();

  const reader = await tab(context, `${origin}/record`, record('/events/news'));
  await cutter.begun();
  const events = [];
  for (let n = 0; n < 2; n += 1) {
    events.push(await server.publish(`event ${n}`));
    await has(reader, events.at(-1));
    cutter.hold();
    cutter.cut();
    events.push(await server.publish(`missed ${n}`), await server.publish(`and missed ${n}`));
    cutter.pass();
    await has(reader, events.at(-1));
  }
  await exactly(reader, events);
  must((await got(reader)).length === events.length, 'a gap where there was none');
}

export async function browser() {
  mkdirSync(SHOTS, { recursive: true });
  const executablePath = process.env.CHROMIUM ?? '/usr/bin/chromium';
  const sandbox = process.getuid() === 0 ? ['--no-sandbox'] : [];
  chrome = await chromium.launch({ executablePath, args: [...sandbox, '--host-resolver-rules=MAP rebound.test 127.0.0.1'] });
  const [, poll] = snippets('In a page', 'js');
  // Without fetch the polyfill takes XMLHttpRequest, as it does in a browser that has no EventSource.
  const old = `delete window.fetch; delete window.EventSource; ${POLYFILL};
    const source = new EventSource('/events/news?since=earliest&poll');`;
  const tests = [
    ['the page at /, in four looks, two tabs, and one closed', [], thePageAtTheRoot],
    ['the page under a prefix, at 360 and at 1280', [], thePageUnderAPrefix],
    ['one tab is one subscriber until it is asked for more', [], oneTabIsOneSubscriber],
    ...PLACES.map(place => [`the article's page, from ${place.name}`, place.flags, given => theArticle(given, place)]),
    ['a page of another origin neither reads nor publishes', [], aForeignPage],
    [
      'a page that is allowed reads with a cookie, and publishes',
      [`--allow-origin=${ELSEWHERE}`, '--publish-token=writer', '--subscribe-token=reader'],
      anAllowedPage,
    ],
    ['a name that was made to lead here is not answered', [], aReboundName],
    ['a script in the data is text', [], aScriptInTheData],
    ['a cut stream goes on, with nothing lost and nothing twice', [], aCutStream],
    ['a restarted server is heard again, and a gap', [], given => aRestart(given)],
    ['with a journal, a restart is not noticed', [], given => aRestart(given, `--journal=${join(temporary(), 'journal')}`)],
    ['no room for a while loses nothing', ['--subscribers=1'], noRoom],
    ['one stream serves eight tabs, and the leader may close', [], oneStreamForAllTabs],
    ['polling with EventSource', [], given => polling(given, poll)],
    ['polling with the polyfill and XMLHttpRequest', [], given => polling(given, old)],
  ];
  const theFile = async () => withRunning(await Server.run('brooklet-minimal', '127.0.0.1:0'), theOneFile);
  await Promise.all([
    ...tests.map(([name, flags, body]) => test(name, () => withServer(flags, body))),
    test('the page of the server in one file, and a cut stream of it', theFile),
  ]);
  await chrome.close();
}
