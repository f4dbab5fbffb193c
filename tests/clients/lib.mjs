// What the parts share: the server as a process, a TCP proxy that cuts, waiting on conditions with deadlines, the count.
import { spawn } from 'node:child_process';
import { createServer, connect } from 'node:net';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));
export const TARGET = join(ROOT, 'target/clients');
// Longest that any condition is waited for: a bound against hanging, not a measure of speed.
const PATIENCE_MS = 60_000;

export const pause = ms => new Promise(done => setTimeout(done, ms));
const late = async () => {
  await new Promise(done => setTimeout(done, 4 * PATIENCE_MS).unref());
  throw new Error('it did not end in time');
};

// Waits until the condition gives something. What is said in vain may be a function, for what is only known then.
export async function until(what, condition) {
  const deadline = Date.now() + PATIENCE_MS;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`waited in vain for ${typeof what === 'function' ? what() : what}`);
    await pause(20);
  }
}

// What waits inside of others' code has a deadline, too.
export const inTime = promise => Promise.race([promise, late()]);

export function must(condition, what) {
  if (!condition) throw new Error(what);
}

// Whatever was started ends with us, in whichever way we end.
const ends = new Set();
export function atEnd(end) {
  ends.add(end);
  return () => {
    if (ends.delete(end)) end();
  };
}
process.on('exit', () => ends.forEach(end => end()));
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => process.exit(1));

export function temporary() {
  const dir = mkdtempSync(join(tmpdir(), 'brooklet-clients-'));
  atEnd(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

// A process whose lines are kept, and each handed to `onLine`.
export class Process {
  constructor(command, args, { onLine, ...options } = {}) {
    this.out = this.err = '';
    this.child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], detached: true, ...options });
    this.exited = new Promise(done => {
      this.child.on('exit', done);
      this.child.on('error', error => done(this.err += error.message));
    });
    this.exited.then(() => this.gone = true);
    this.kill = atEnd(() => {
      try {
        process.kill(-this.child.pid, 'SIGKILL'); // the group: a shell's children, too
      } catch { /* it is gone */ }
    });
    let rest = '';
    this.child.stdout.setEncoding('utf8').on('data', text => {
      this.out += text;
      const lines = (rest + text).split('\n');
      rest = lines.pop();
      lines.forEach(line => onLine?.(line));
    });
    this.child.stderr.setEncoding('utf8').on('data', text => this.err += text);
  }
}

export class Server extends Process {
  static start(...flags) {
    const where = flags.some(flag => flag.startsWith('--listen')) ? [] : ['--listen=127.0.0.1:0'];
    return Server.run('brooklet', ...where, ...flags);
  }

  static async run(program, ...args) {
    const server = new Server(join(ROOT, 'target/release', program), args);
    await until(() => `the server's address: ${server.err}`, () => server.out.includes('listens on') || server.gone);
    server.port = Number(server.out.match(/http:\/\/127\.0\.0\.1:(\d+) /)?.[1]);
    must(server.port, `the server did not start: ${server.err}`);
    return server;
  }

  async stop() {
    this.child.kill('SIGTERM');
    await until('the server to stop', () => this.gone);
  }

  // Publishes one event, and gives it back with its id.
  async publish(data, query = {}, topic = 'news') {
    const id = await publish(`http://127.0.0.1:${this.port}/events/${topic}`, data, query);
    return { type: query.event ?? 'message', id, data };
  }

  async metric(name) {
    const text = await (await fetch(`http://127.0.0.1:${this.port}/metrics`)).text();
    return Number(text.match(new RegExp(`^brooklet_${name} (\\d+)$`, 'm'))[1]);
  }

  // Until a first stream has its place in the order of events: being counted as a subscriber comes a moment before.
  listening() {
    return until('a stream of a topic', async () => await this.metric('topics') > 0);
  }

  subscribers(count) {
    return until(() => `${count} subscribers`, async () => await this.metric('subscribers') === count);
  }
}

export async function publish(url, data, query = {}) {
  const answer = await fetch(`${url}?${new URLSearchParams(query)}`, { method: 'POST', body: data });
  const text = (await answer.text()).trim();
  must(answer.ok, `publishing was refused: ${answer.status} ${text}`);
  return text;
}

// Ids are MILLISECONDS-SEQUENCE, and compared as numbers.
export function newer(a, b) {
  const [[ams, aseq], [bms, bseq]] = [a, b].map(id => id.split('-').map(BigInt));
  return ams > bms || (ams === bms && aseq > bseq);
}

// A TCP proxy that cuts. It ends connections in order (FIN), as when a process dies: nothing tells the reader of an answer
// without a length that it is not whole.
export class Cutter {
  static async before(port) {
    const cutter = new Cutter();
    Object.assign(cutter, { upstream: port, mode: 'pass', opened: 0, refused: 0, pairs: new Set(), held: [], heads: [] });
    cutter.server = createServer(socket => cutter.accept(socket));
    await new Promise(done => cutter.server.listen(0, '127.0.0.1', done));
    cutter.port = cutter.server.address().port;
    cutter.close = atEnd(() => {
      cutter.server.close();
      cutter.cut();
    });
    return cutter;
  }

  accept(socket) {
    this.opened += 1;
    this.openedAt = performance.now();
    socket.on('error', () => socket.destroy());
    if (this.mode === 'pass') this.join(socket);
    if (this.mode === 'hold') this.held.push(socket);
    if (this.mode === 'refuse') {
      this.refused += 1;
      socket.resetAndDestroy();
    }
  }

  join(near) {
    const pair = { near, far: connect(this.upstream, '127.0.0.1') };
    this.pairs.add(pair);
    const end = () => this.end(pair);
    near.on('data', bytes => {
      if (!pair.head) this.heads.push(pair.head = bytes.toString());
      pair.far.write(bytes);
    });
    pair.far.on('data', bytes => {
      pair.begun ||= bytes.includes('\n\n');
      const at = this.marker ? bytes.indexOf(this.marker) : -1;
      if (at < 0) return near.write(bytes);
      near.write(bytes.subarray(0, at + this.marker.length));
      this.marker = undefined;
      this.hold();
      this.cut();
    });
    for (const socket of [near, pair.far]) socket.on('end', end).on('close', end).on('error', end);
  }

  // Until a stream's first block has gone through. It ends as no head does.
  begun() {
    return until('a first block', () => [...this.pairs].some(pair => pair.begun));
  }

  end(pair) {
    if (!this.pairs.delete(pair)) return;
    pair.near.end();
    pair.far.destroy();
    // Who does not close in return is closed: a cut is a cut.
    setTimeout(() => pair.near.destroy(), 1_000).unref();
  }

  cut() {
    for (const pair of [...this.pairs]) this.end(pair);
    this.cutAt = performance.now();
  }

  // New connections wait, are refused, or are let through (and those that waited).
  hold() { this.mode = 'hold'; }
  refuse() { this.mode = 'refuse'; }
  pass() {
    this.mode = 'pass';
    this.held.splice(0).forEach(socket => socket.destroyed || this.join(socket));
  }

  // Cuts in the middle of an event, after these characters, and holds what comes.
  cutAfter(text) { this.marker = Buffer.from(text); }
}

// The README's own text: what stands in the fences of a language under a heading.
export function snippets(heading, language) {
  const readme = readFileSync(join(ROOT, 'README.md'), 'utf8');
  const section = readme.split(/^## /m).find(part => part.startsWith(`${heading}\n`));
  must(section, `the README has no section ${heading}`);
  const found = [...section.matchAll(new RegExp(`^\`\`\`${language}\\n([^]*?)^\`\`\``, 'gm'))].map(match => match[1]);
  must(found.length, `the README's section ${heading} has no ${language}`);
  return found;
}

const counts = { passed: 0, failed: 0 };
export function passed() { counts.passed += 1; }
export function failed(name, error) {
  counts.failed += 1;
  console.error(`FAILED: ${name}: ${error?.stack ?? error}`);
}
export async function test(name, body) {
  try {
    await inTime(body());
    passed();
  } catch (error) {
    failed(name, error);
  }
}
// Also what nobody waits for any more is a failure, and no reason to leave without the count.
process.on('unhandledRejection', error => failed('left to itself', error));
export function summary() { return counts; }
