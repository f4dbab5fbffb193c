// @microsoft/fetch-event-source: made for pages, so outside of one it wants these two. It takes an answer's end for the end
// of all, unless `onclose` throws; then it reconnects by itself. It hands over blocks without data, too.
import { createRequire } from 'node:module';
const { fetchEventSource } = createRequire(import.meta.url)('@microsoft/fetch-event-source');
globalThis.window = globalThis;
globalThis.document = { addEventListener() {}, removeEventListener() {} };

const say = what => console.log(JSON.stringify(what));
await fetchEventSource(process.argv[2], {
  openWhenHidden: true,
  onmessage: ({ event, id, data }) => say({ type: event || 'message', id, data }),
  onclose() { throw new Error('the stream ended'); },
  onerror() { say({ end: true }); },
});
say({ gaveUp: true });
