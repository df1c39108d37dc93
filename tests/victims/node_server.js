// usage: node node_server.js PORT_FILE: an HTTP server with hot, JIT-compiled code, a heap of objects, timers and zlib threads.
'use strict';
const http = require('http');
const fs = require('fs');
const crypto = require('crypto');
const zlib = require('zlib');

const data = new Map();
for (let i = 0; i < 50000; i++) data.set('key' + i, { i, text: 'v'.repeat(i % 50), list: [i, i * 2, i / 3] });
const doubles = Float64Array.from({ length: 1 << 19 }, (_, i) => Math.sin(i));
let served = 0;
let ticks = 0;
setInterval(() => { ticks++; }, 10);

function mix(n, rounds) {
  let h = (n | 0) ^ 0x9e3779b9;
  for (let i = 0; i < rounds; i++) {
    h = Math.imul(h ^ (h >>> 15), 0x85ebca6b) + i | 0;
    h ^= Math.floor(doubles[(h >>> 0) % doubles.length] * 1e6) | 0;
  }
  return h >>> 0;
}

function digest() {
  const hash = crypto.createHash('sha256');
  hash.update(Buffer.from(doubles.buffer));
  for (const [key, value] of data) hash.update(key + JSON.stringify(value));
  return hash.digest('hex');
}

const server = http.createServer((request, response) => {
  const url = new URL(request.url, 'http://x');
  const n = parseInt(url.searchParams.get('n') || '0');
  served++;
  const end = (text) => { response.setHeader('Connection', 'close'); response.end(text); };
  if (url.pathname === '/digest') end(digest());
  else if (url.pathname === '/mix') end(String(mix(n, 20000)));
  else if (url.pathname === '/ticks') end(String(ticks));
  else if (url.pathname === '/zip') {
    zlib.deflate(Buffer.from('lazy'.repeat(n)), (error, packed) => end(error ? 'error' : zlib.inflateSync(packed).toString()));
  } else if (url.pathname === '/garbage') {
    let kept = [];
    for (let i = 0; i < n; i++) { kept.push({ a: 'x' + i, b: [i] }); if (kept.length > 10000) kept = []; }
    end(String(kept.length));
  } else if (url.pathname === '/evaluate') end(String(new Function('n', 'let s = 0; for (let i = 0; i < n; i++) s += i; return s')(n)));
  else if (url.pathname === '/file') fs.readFile(__filename, 'utf8', (error, text) => end(error ? 'error' : String(text.length)));
  else end(String(served));
});
server.listen(0, '127.0.0.1', () => {
  fs.writeFileSync(process.argv[2] + '.new', String(server.address().port));
  fs.renameSync(process.argv[2] + '.new', process.argv[2]);
});
