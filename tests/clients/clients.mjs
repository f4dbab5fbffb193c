// Each client subscribes, is cut off in every way we know, comes back, and is judged by what it said it got.
import { join } from 'node:path';
import { Cutter, Process, Server, TARGET, failed, inTime, must, newer, passed, temporary, until } from './lib.mjs';

// The last three: an event that was cut in its middle comes whole, and once; a block without data is not taken for an event;
// and its id is, so that a client that is cut off before its first event misses nothing.
const PROPERTIES = ['order', 'resume', 'multi-line', 'unicode', 'retry', 'gap', 'end', 'cut event', 'no data', 'first id'];
const MULTI = 'first\n  second: indented\n\nlast\n';
const UNICODE = 'žluťoučký kůň 🐟 日本語 \u2028\u0085 "quoted" \\ and\ttab';
const HALF = 'half an event';
const FLAGS = ['--retry=200ms', '--log=off'];
const RETRY_MS = 4_000; // above every client's own default

// Everything is a yes, `but` what is named here. That is asserted, too: should a client learn better, its line is corrected.
// Where the first id is not taken, `?since=` in the URL is the remedy: it counts until there is an id.
function all(dir) {
  const node = process.execPath;
  const source = which => [node, '--experimental-eventsource', '--no-warnings', 'eventsource.mjs', which];
  const python = program => [join(TARGET, 'venv/bin/python'), program];
  return [
    { name: 'eventsource 2', run: source('eventsource-2') },
    { name: 'eventsource 4', run: source('eventsource-4'), but: { 'first id': 'no' } },
    { name: 'eventsource 5', run: source('eventsource-5') },
    { name: 'Node EventSource', run: source('node') },
    { name: 'fetch-event-source', run: [node, 'fetch-event-source.mjs'], but: { 'no data': 'no' } },
    { name: 'event-source-polyfill', run: source('polyfill'), query: '?since=earliest' },
    { name: 'polyfill with ?poll', run: source('polyfill'), query: '?since=earliest&poll=5s', but: { retry: 'n/a' } },
    { name: 'httpx-sse', run: python('httpx-sse.py'), but: { 'no data': 'no' }, needs: 'python' },
    { name: 'requests', run: [...python('python-http.py'), 'requests'], needs: 'python' },
    { name: 'urllib3', run: [...python('python-http.py'), 'urllib3'], needs: 'python' },
    { name: 'requests-sse', run: python('requests-sse.py'), but: { 'multi-line': 'no' }, needs: 'python' },
    { name: 'launchdarkly-eventsource', run: python('launchdarkly.py'), query: '?since=earliest', but: { retry: 'no' }, needs: 'python' },
    { name: 'sseclient-py', run: python('sseclient-py.py'), query: '?since=earliest', needs: 'python' },
    { name: 'reqwest-eventsource', run: [join(TARGET, 'rust/target/debug/reqwest-eventsource-client')], but: { 'first id': 'no' }, needs: 'rust' },
    { name: 'HTTP::Tiny', run: ['perl', 'http-tiny.pl'], but: { retry: 'no' }, needs: 'perl' }, // it asks again at once
    { name: 'LuaSocket', run: ['lua5.4', 'luasocket.lua'], needs: 'lua' },
    { name: 'PHP fopen, HTTP/1.0', run: ['php', 'fopen.php'], needs: 'php' },
    { name: 'curl', run: ['sh', 'curl.sh'], flags: [join(dir, 'curl')], needs: 'curl' },
  ];
}

async function judge({ run, query = '', flags = [] }) {
  const sent = [], got = [];
  let ends = 0, gaveUp = false;
  let current = await Server.start(...FLAGS);
  const cutter = await Cutter.before(current.port);
  const url = `http://127.0.0.1:${cutter.port}/events/news${query}`;
  const types = ['gap', 'größe', 'empty'];
  cutter.hold();
  const client = new Process(run[0], [...run.slice(1), url, ...(flags.length ? flags : types)], {
    cwd: TARGET,
    onLine(line) {
      const said = JSON.parse(line);
      if (said.end) ends += 1;
      if (said.gaveUp) gaveUp = true;
      if (said.data !== undefined) got.push(said);
    },
  });
  const have = event => until(() => `${JSON.stringify(event)} after ${JSON.stringify(got.slice(-5))}; ${client.err}`, () => {
    must(!client.gone && !gaveUp, `the client gave up: ${client.err}`);
    return got.some(({ id, data }) => id === event.id && data === event.data);
  });
  const publish = async (data, query) => {
    const event = await current.publish(data, query);
    sent.push(event);
    return event;
  };
  const connections = count => until(() => `connection ${count}: ${client.err}`, () => cutter.opened >= count);
  // Until the server has seen it go, and it stands before the door again.
  const away = async () => {
    await connections(came + 1);
    await current.subscribers(0);
  };
  const back = async () => {
    cutter.pass();
    if (!query.includes('poll')) await cutter.begun();
    came = cutter.opened;
  };
  // Another server in the same place: for a moment nobody is there, and what was kept is gone.
  const restart = async (...flags) => {
    const refused = cutter.refused;
    cutter.refuse();
    await current.stop();
    await until('a refused connection', () => cutter.refused > refused);
    cutter.hold();
    current = await Server.start(...FLAGS, ...flags);
    cutter.upstream = current.port;
    await publish('restarted');
    await back();
    await have(await publish('again'));
  };
  let came = 0;

  // Cut before its first event, with only the cursor of the first block to come back with.
  await away();
  await back();
  cutter.hold();
  cutter.cut();
  await away();
  const early = await publish('early');
  await back();
  await have(await publish('now'));
  await publish(MULTI);
  await publish(UNICODE, { event: 'größe' });
  await have(await publish('', { event: 'empty' }));

  // Restarted, and ended by the server's lifetime while events go on.
  const before = got.at(-1).id;
  await restart('--lifetime=2s');
  const [through, endsBefore] = [cutter.opened + 2, ends];
  for (let n = 0; cutter.opened < through; n += 1) await have(await publish(`number ${n}`));
  const ended = ends > endsBefore;
  await restart();

  // Cut in the middle of an event.
  came = cutter.opened;
  cutter.cutAfter(HALF);
  const halved = await publish(`${HALF}\nand its other half`);
  await until('the cut', () => cutter.mode === 'hold');
  await away();
  await publish('missed');
  await back();

  // Told to wait for longer than it would by itself.
  await have(await publish('wait', { retry: RETRY_MS }));
  came = cutter.opened; // a poll has ended some times more
  cutter.hold();
  cutter.cut();
  await away();
  const waited = cutter.openedAt - cutter.cutAt;
  cutter.pass();
  await have(await publish('last'));
  client.kill();
  cutter.close();
  await current.stop();

  const ids = new Set(sent.map(event => event.id));
  const gaps = got.filter(event => event.type === 'gap' && JSON.parse(event.data).after === before);
  const blank = got.filter(event => event.data === '' && event.type !== 'empty');
  const halves = got.filter(event => event.data.trim() === HALF);
  const events = got.filter(event => ids.has(event.id) && !blank.includes(event) && !halves.includes(event));
  const once = event => {
    const same = events.filter(({ id }) => id === event.id);
    return same.length === 1 && same[0].type === event.type && same[0].data === event.data;
  };
  const has = data => events.some(event => event.data === data);
  const yes = {
    order: events.every((event, n) => n === 0 || newer(event.id, events[n - 1].id)),
    resume: sent.every(event => event === early || event === halved || event.data === MULTI || once(event)),
    'multi-line': has(MULTI),
    unicode: events.some(event => event.data === UNICODE && event.type === 'größe'),
    retry: waited >= RETRY_MS - 50, // timers may be a little early
    gap: gaps.length > 0,
    end: ended,
    'cut event': once(halved) && halves.length === 0,
    'no data': blank.length === 0,
    'first id': once(early),
  };
  const lost = sent.filter(event => !once(event));
  const details = { lost, blank, halves, waited, ends, connections: cutter.heads };
  return { observed: Object.fromEntries(PROPERTIES.map(name => [name, yes[name] ? 'yes' : 'no'])), details };
}

export async function clients(has) {
  const rows = all(temporary()).filter(client => !client.needs || has(client.needs));
  const table = [['', ...PROPERTIES]];
  await Promise.all(rows.map(async (client, n) => {
    try {
      const { observed, details } = await inTime(judge(client));
      for (const name of PROPERTIES) if (client.but?.[name] === 'n/a') observed[name] = 'n/a';
      table[n + 1] = [client.name, ...Object.values(observed)];
      const wrong = PROPERTIES.filter(name => observed[name] !== (client.but?.[name] ?? 'yes'));
      must(!wrong.length, `${wrong.join(', ')}: not as it was; ${JSON.stringify(details, null, 1)}`);
      passed();
    } catch (error) {
      table[n + 1] ??= [client.name, 'failed'];
      failed(client.name, error);
    }
  }));
  const widths = table[0].map((_, n) => Math.max(...table.map(row => (row[n] ?? '').length)));
  for (const row of table) console.log(`  ${row.map((cell, n) => cell.padEnd(widths[n])).join('  ')}`.trimEnd());
}
