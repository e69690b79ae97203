// A Node.js server: a timer that ticks, a buffer outside of the JavaScript heap, objects in it, and the thread pool at work.
//
//   GET /check   timers go on, memory is as it was made, the thread pool answers
//   GET /hash?text=T   a hash computed on the thread pool, for answers that must not change

'use strict';

const crypto = require('node:crypto');
const http = require('node:http');
const { parseArgs } = require('node:util');

const BUFFER_BYTES = 32 << 20;
const ENTRIES = 20000;
const PERIOD_MS = 20;

const { values: options } = parseArgs({
  options: { host: { type: 'string', default: '127.0.0.1' }, port: { type: 'string', default: '8000' } },
});

const sha256 = (data) => crypto.createHash('sha256').update(data).digest('hex');

// The first process of a namespace is not ended by a signal that it does not handle.
process.on('SIGTERM', () => process.exit(0));

let ticks = 0;
setInterval(() => ticks++, PERIOD_MS);

// The same bytes in each run: a stream cipher over zeros.
const buffer = crypto.createCipheriv('aes-256-ctr', Buffer.alloc(32, 7), Buffer.alloc(16)).update(Buffer.alloc(BUFFER_BYTES));
const bufferDigest = sha256(buffer);

const objects = new Map();
for (let number = 0; number < ENTRIES; number++) objects.set(`key ${number}`, { number, text: `value ${number}` });
const serialise = () => JSON.stringify([...objects]);
const objectsDigest = sha256(serialise());

// scrypt runs on libuv's thread pool.
const onThreadPool = (text) =>
  new Promise((resolve, reject) =>
    crypto.scrypt(text, 'salt', 32, { N: 256 }, (error, key) => (error ? reject(error) : resolve(key.toString('hex')))),
  );
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function check() {
  const before = ticks;
  for (let waited = 0; ticks === before && waited < 5000; waited += PERIOD_MS) await sleep(PERIOD_MS);
  const parts = {
    timer: ticks > before ? 'ok' : 'the timer no longer ticks',
    buffer: sha256(buffer) === bufferDigest ? 'ok' : 'the buffer has changed',
    objects: sha256(serialise()) === objectsDigest ? 'ok' : 'the objects have changed',
    thread_pool: (await onThreadPool('check')) === (await threadPoolExpected) ? 'ok' : 'the thread pool computes differently',
  };
  const ok = Object.values(parts).every((part) => part === 'ok');
  return [ok ? 200 : 500, { ok, parts, seen: { ticks } }];
}

async function answer(request) {
  const url = new URL(request.url, 'http://server');
  switch (url.pathname) {
    case '/healthz':
      return [200, { ready: true }];
    case '/check':
      return check();
    case '/hash':
      return [200, { hash: await onThreadPool(url.searchParams.get('text') ?? '') }];
    default:
      return [404, { error: `no ${url.pathname}` }];
  }
}

const server = http.createServer(async (request, response) => {
  let status, value;
  try {
    [status, value] = await answer(request);
  } catch (error) {
    [status, value] = [500, { ok: false, error: String(error) }];
  }
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(JSON.stringify(value));
});

const threadPoolExpected = onThreadPool('check');
threadPoolExpected.then(() =>
  server.listen(Number(options.port), options.host, () => console.log(`listening on ${options.host}:${options.port}`)),
);
