// Everything in JavaScript that is shaped like the browser's EventSource: eventsource.mjs WHICH URL TYPE...
import { createRequire } from 'node:module';
const [which, url, ...types] = process.argv.slice(2);
const say = what => console.log(JSON.stringify(what));
const require = createRequire(import.meta.url);
const EventSource = {
  node: () => globalThis.EventSource, // behind --experimental-eventsource
  'eventsource-2': () => require('eventsource-2'),
  'eventsource-4': async () => (await import('eventsource-4')).EventSource,
  'eventsource-5': async () => (await import('eventsource-5')).EventSource,
  polyfill: () => require('event-source-polyfill').EventSourcePolyfill,
};

const source = new (await EventSource[which]())(url);
for (const type of ['message', ...types]) {
  source.addEventListener(type, event => say({ type: event.type, id: event.lastEventId, data: event.data }));
}
source.addEventListener('open', () => say({ open: true }));
source.addEventListener('error', () => say(source.readyState === 2 ? { gaveUp: true } : { end: true }));
setInterval(() => {}, 60_000); // some of them let Node end while they wait to reconnect
