// Runs the parts named on the command line, and says what each took: run.mjs PART... --has=TOOL...
import { failed, summary } from './lib.mjs';

const parts = {
  clients: async () => (await import('./clients.mjs')).clients,
  proxies: async () => (await import('./proxies.mjs')).proxies,
  browser: async () => (await import('./browser.mjs')).browser,
};
// A bound against hanging, not a measure of speed.
setTimeout(() => {
  failed('all of it', new Error('not done after 20 minutes'));
  process.exit(1);
}, 20 * 60_000).unref();
const args = process.argv.slice(2);
const has = tool => args.includes(`--has=${tool}`);
for (const name of args.filter(arg => arg in parts)) {
  const [started, { passed }] = [performance.now(), { ...summary() }];
  await (await parts[name]())(has).catch(error => failed(name, error));
  console.log(`  ${name}: ${summary().passed - passed} passed in ${Math.round((performance.now() - started) / 1_000)} s`);
}
const counts = summary();
console.log(`clients: ${counts.passed} passed, ${counts.failed} failed`);
process.exit(counts.failed ? 1 : 0);
