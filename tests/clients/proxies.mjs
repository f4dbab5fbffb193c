// Behind nginx and Caddy, with the very configuration that the README prints; only its ports are others.
import { writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { Cutter, Process, Server, atEnd, must, newer, publish, snippets, temporary, test, until } from './lib.mjs';

const commands = {
  nginx(dir, snippet) {
    const temps = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(name => `${name}_temp_path ${dir}/${name};`);
    writeFileSync(join(dir, 'nginx.conf'), `
      daemon off; master_process off; pid ${dir}/pid; error_log ${dir}/error.log;
      events {}
      http { access_log off; ${temps.join(' ')}
      ${snippet}
      }`);
    return ['nginx', '-p', dir, '-e', join(dir, 'error.log'), '-c', join(dir, 'nginx.conf')];
  },
  caddy(dir, snippet) {
    writeFileSync(join(dir, 'Caddyfile'), `{\n  admin off\n  auto_https off\n}\n${snippet}`);
    return ['caddy', 'run', '--adapter', 'caddyfile', '--config', join(dir, 'Caddyfile')];
  },
};

const free = () => new Promise(done => {
  const server = createServer().listen(0, '127.0.0.1', () => {
    const { port } = server.address();
    server.close(() => done(port));
  });
});

// Starts the proxy on a free port. Someone may take the port before it does, so it has more than one try.
async function start(kind, snippet, upstream) {
  for (let tries = 1; ; tries += 1) {
    const [dir, port] = [temporary(), await free()];
    const mine = snippet.replaceAll('127.0.0.1:3000', `127.0.0.1:${upstream}`).replace(/listen 80;/, `listen 127.0.0.1:${port};`)
      .replace(/^:80 /m, `http://127.0.0.1:${port} `);
    must(mine.includes(`127.0.0.1:${upstream}`) && mine.includes(`127.0.0.1:${port}`), `no ports to change in ${snippet}`);
    const [command, ...args] = commands[kind](dir, mine);
    const proxy = new Process(command, args, { env: { ...process.env, HOME: dir, XDG_DATA_HOME: dir, XDG_CONFIG_HOME: dir } });
    const url = `http://127.0.0.1:${port}`;
    const answers = () => fetch(`${url}/health`).then(answer => answer.ok, () => false);
    await until(() => `${kind}: ${proxy.out}${proxy.err}`, async () => proxy.gone || await answers());
    if (!proxy.gone) return { url, stop: () => proxy.kill() };
    must(tries < 5, `${kind} does not start: ${proxy.out}${proxy.err}`);
  }
}

// A stream as its blocks come in.
async function listen(url, lastEventId) {
  const abort = new AbortController();
  const answer = await fetch(url, { signal: abort.signal, headers: lastEventId ? { 'Last-Event-ID': lastEventId } : {} });
  must(answer.status === 200, `${url} answered ${answer.status}`);
  must(answer.headers.get('content-type') === 'text/event-stream', `the type is ${answer.headers.get('content-type')}`);
  const stream = { blocks: [], ended: false, close: atEnd(() => abort.abort()), answer };
  const read = async () => {
    let rest = '';
    for await (const text of answer.body.pipeThrough(new TextDecoderStream())) {
      const blocks = (rest + text).split('\n\n');
      rest = blocks.pop();
      stream.blocks.push(...blocks);
    }
  };
  read().then(() => stream.ended = true, error => stream.broken = error);
  stream.block = n => until(() => `block ${n} of ${JSON.stringify(stream.blocks)}`, () => {
    must(!stream.broken && (!stream.ended || stream.blocks.length > n), `the stream is over: ${stream.broken}`);
    return stream.blocks[n];
  });
  return stream;
}

async function behind(kind, name, snippet, { streamingPut, restart, upstreamVersion } = {}) {
  const server = await Server.start('--log=off');
  const between = await Cutter.before(server.port); // it cuts nothing here, but sees what the proxy asks
  const proxy = await start(kind, snippet, between.port);
  const topic = `${proxy.url}/events/news`;

  await test(`${name}: the page and errors come through`, async () => {
    must((await (await fetch(proxy.url)).text()).includes('<title>brooklet'), 'no page');
    must((await fetch(`${proxy.url}/events/a%20b`)).status === 400, 'no 400');
  });
  await test(`${name}: events come one by one, at once`, async () => {
    const stream = await listen(topic);
    must(/^retry: \d+\nid: \d+-\d+$/.test(await stream.block(0)), `the first block is ${stream.blocks[0]}`);
    for (let n = 1; n <= 5; n += 1) {
      const id = await publish(topic, `event ${n}`);
      must(await stream.block(n) === `data: event ${n}\nid: ${id}`, `block ${n} is ${stream.blocks[n]}`);
    }
    stream.close();
    await server.subscribers(0);
  });
  await test(`${name}: a reader that comes back gets what it missed, once`, async () => {
    const first = await listen(topic);
    await first.block(0);
    const seen = await publish(topic, 'seen');
    await first.block(1);
    first.close();
    await server.subscribers(0);
    const missed = [await publish(topic, 'missed 1'), await publish(topic, 'missed 2')];
    const second = await listen(topic, seen);
    must((await second.block(0)).endsWith(`id: ${seen}`), `it goes on after ${second.blocks[0]}`);
    const last = await publish(topic, 'last');
    await second.block(3);
    const ids = second.blocks.slice(1).map(block => block.match(/^id: (.*)/m)[1]);
    must(ids.join() === [...missed, last].join(), `it got ${second.blocks.join('|')}`);
    second.close();
    await server.subscribers(0);
  });
  await test(`${name}: a PUT publishes its lines${streamingPut ? ' as they come' : ''}`, async () => {
    const stream = await listen(topic);
    await stream.block(0);
    const lines = new TransformStream();
    const writer = lines.writable.getWriter();
    const request = { method: 'PUT', duplex: 'half', body: lines.readable.pipeThrough(new TextEncoderStream()) };
    const answer = fetch(topic, request);
    answer.catch(() => {}); // it is awaited below, if we get there
    for (let n = 1; n <= 3; n += 1) {
      writer.write(`line ${n}\n`);
      if (streamingPut) must((await stream.block(n)).startsWith(`data: line ${n}\n`), `block ${n} is ${stream.blocks[n]}`);
    }
    writer.close();
    const text = await (await answer).text();
    must(/^published 3, last id \d+-\d+\n$/.test(text), `the answer is ${text}`);
    must((await stream.block(3)).startsWith('data: line 3\n'), 'not all lines came');
    stream.close();
  });
  if (upstreamVersion) {
    await test(`${name}: it asks the server for streams in HTTP/${upstreamVersion}`, async () => {
      const versions = between.heads.filter(head => head.startsWith('GET /events/')).map(head => head.match(/ HTTP\/(\d\.\d)\r\n/)[1]);
      must(versions.length && versions.every(version => version === upstreamVersion), `it spoke ${versions}`);
    });
  }

  // Another server in the same place, whose streams end by themselves.
  await server.stop();
  if (restart) await test(`${name}: a restart strands no browser`, () => restart(topic, between));
  const brief = await Server.start('--log=off', '--lifetime=2s');
  between.upstream = brief.port;
  between.pass();
  await test(`${name}: an ended stream ends, and goes on where it was`, async () => {
    const stream = await listen(topic);
    await stream.block(0);
    const id = await publish(topic, 'before the end');
    await until('the end', () => stream.ended || stream.broken);
    must(!stream.broken, `it broke off: ${stream.broken}`);
    must(/^: the lifetime is over\nretry: \d+$/.test(stream.blocks.at(-1)), `it ended with ${stream.blocks.at(-1)}`);
    const after = await publish(topic, 'after the end');
    must(newer(after, id), 'ids go back');
    const next = await listen(topic, id);
    must(await next.block(1) === `data: after the end\nid: ${after}`, `it went on with ${next.blocks[1]}`);
    next.close();
  });
  proxy.stop();
  between.close();
  await brief.stop();
}

// While nobody is there, a stream is answered with 200 and a retry, a publisher with an error.
async function nginxRestart(topic, between) {
  between.refuse();
  const stream = await listen(topic);
  must(await stream.block(0) === 'retry: 3000', `the answer is ${stream.blocks[0]}`);
  await until('its end', () => stream.ended);
  for (const method of ['POST', 'PUT']) {
    const answer = await fetch(topic, { method, body: 'lost\n' });
    must(answer.status === 502, `a ${method} was answered ${answer.status}`);
  }
}

// A stream that is asked for while nobody is there waits for the server.
async function caddyRestart(topic, between) {
  between.refuse();
  const stream = listen(topic);
  stream.catch(() => {});
  await until('some tries', () => between.refused > 2);
  const server = await Server.start('--log=off');
  between.upstream = server.port;
  between.pass();
  const opened = await stream;
  await opened.block(0);
  opened.close();
  await server.stop();
}

export async function proxies(has) {
  if (has('nginx')) {
    const [plain, full] = snippets('Behind a proxy', 'nginx');
    const old = plain.replace('proxy_pass', 'proxy_http_version 1.0; proxy_pass');
    await Promise.all([
      behind('nginx', 'nginx, plain', plain),
      behind('nginx', 'nginx, HTTP/1.0', old, { upstreamVersion: '1.0' }),
      behind('nginx', 'nginx, full', full, { streamingPut: true, restart: nginxRestart, upstreamVersion: '1.1' }),
    ]);
  }
  if (has('caddy')) {
    const [caddy] = snippets('Behind a proxy', 'caddy');
    await behind('caddy', 'Caddy', caddy, { streamingPut: true, restart: caddyRestart, upstreamVersion: '1.1' });
  }
}
