// usage: node node_worker.js SOCKET [MEGABYTES]: worker.py's service in Node.js, without /fork: a child of fork() has
// none of the threads that Node works with.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

const [path, megabytes = '64'] = process.argv.slice(2);
const ROWS_TOUCHED = 64;
const VOCABULARY = 60000;
const ROW = 256; // floats; a block has 1024 rows

let seed = 7;
const random = () => (seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff);
const blocks = Array.from({ length: Number(megabytes) }, () => Float32Array.from({ length: 1024 * ROW }, () => (random() >> 8) % 1000 / 8));
const words = new Map();
for (let i = 0; i < VOCABULARY; i++) words.set('word-' + i, { i, half: i * 0.5, text: String(i) });

function part() {
  const hash = crypto.createHash('sha256');
  for (let i = 0; i < Math.min(ROWS_TOUCHED, blocks.length); i += 8) {
    hash.update(blocks[i].subarray(i * ROW, (i + 1) * ROW).map((value) => value * 2));
  }
  for (let i = 0; i < VOCABULARY; i += Math.floor(VOCABULARY / ROWS_TOUCHED)) hash.update(JSON.stringify(words.get('word-' + i)));
  return hash.digest('hex');
}

function whole() {
  const hash = crypto.createHash('sha256');
  for (const block of blocks) hash.update(block);
  for (const [word, value] of words) hash.update(word + JSON.stringify(value));
  return hash.digest('hex');
}

const answers = { '/all': whole, '/empty': () => '' };
const server = http.createServer((request, response) => {
  const body = JSON.stringify({ digest: (answers[request.url] || part)() });
  response.writeHead(200, { 'Content-Length': body.length, Connection: 'close' });
  response.end(body);
});
fs.rmSync(path, { force: true });
server.listen(path);
