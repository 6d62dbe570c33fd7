# Computes, hashes, compiles WebAssembly, and runs worker threads on shared memory.
cd /tmp || exit
cat > work.js <<'EOF'
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const crypto = require('crypto');

if (!isMainThread) {
    const { shared, from } = workerData;
    const cells = new Int32Array(shared);
    for (let n = 0; n < 10000; n++) Atomics.add(cells, 0, from + n);
    parentPort.postMessage(from);
} else {
    // Long enough for the optimising compiler.
    let hash = 2166136261, wave = 0;
    for (let n = 0; n < 1000000; n++) {
        hash = Math.imul(hash ^ (n & 255), 16777619);
        wave += Math.sqrt(n) * (n % 3 - 1);
    }
    console.log('hash', hash >>> 0, 'wave', wave.toFixed(6));
    console.log('big', ((2n ** 521n - 1n) * 3n ** 100n % 1000000007n).toString());
    const data = Buffer.alloc(1 << 20, 'squib');
    console.log('sha256', crypto.createHash('sha256').update(data).digest('hex'));
    const key = crypto.scryptSync('word', 'salt', 16, { N: 1024 });
    const cipher = crypto.createCipheriv('aes-128-gcm', key, Buffer.alloc(12));
    cipher.update(data);
    cipher.final();
    console.log('aes', cipher.getAuthTag().toString('hex'));
    console.log('zlib', require('zlib').gunzipSync(require('zlib').gzipSync(data)).equals(data));
    // (func (export "f") (param i32 i32) (result i32) local.get 0 local.get 1 i32.mul)
    const wasm = Buffer.from('0061736d0100000001070160027f7f017f030201000705010166000' +
        '00a09010700200020016c0b', 'hex');
    console.log('wasm', new WebAssembly.Instance(new WebAssembly.Module(wasm)).exports.f(1234, 5678));
    const shared = new SharedArrayBuffer(4);
    const workers = [1, 2, 3].map(from => new Promise((done, failed) => {
        new Worker(__filename, { workerData: { shared, from } }).on('message', done).on('error', failed);
    }));
    Promise.all(workers).then(all => console.log('workers', all.join(), new Int32Array(shared)[0]));
}
EOF
node work.js
echo "status $?"
