// Runs a job's models in onnxruntime-web, in Node and in a browser; see web.py for the job.
//
// `io` is how files and time reach the place: read(name) and write(name, bytes), both async,
// advance(), and now() in nanoseconds.

const VIEWS = {
  float32: Float32Array,
  float64: Float64Array,
  // Where the language has it, onnxruntime-web wants it.
  float16: globalThis.Float16Array ?? Uint16Array,
  int8: Int8Array,
  uint8: Uint8Array,
  bool: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  uint32: Uint32Array,
  int64: BigInt64Array,
  uint64: BigUint64Array,
};

export function reason(error) {
  const text = String(error?.message ?? error).replace(/\s+/g, " ").trim();
  return text.length <= 400 ? text : text.slice(0, 399) + "…";
}

// y = Identity(x): the first session starts WebAssembly too, which is not the model's own time.
const TINY =
  "CAg6OQoSCgF4EgF5IghJZGVudGl0eToAEgFnWg8KAXgSCgoICAESBAoCCAFiDwoBeRIKCggIARIECgIIAUIECgAQDQ==";

/** Start the library. */
export async function begin(ort, job) {
  const bytes = Uint8Array.from(atob(TINY), (letter) => letter.charCodeAt(0));
  const options = { executionProviders: [job.provider] };
  await (await ort.InferenceSession.create(bytes, options)).release();
}

async function load(ort, job, io, index, extra = {}) {
  const model = job.models[index];
  const options = { executionProviders: [job.provider], ...extra };
  if (job.strict && job.provider !== "wasm") {
    options.extra = { session: { disable_cpu_ep_fallback: "1" } };
  }
  if (model.external.length) {
    options.externalData = [];
    for (const part of model.external) {
      options.externalData.push({ path: part.path, data: await io.read(part.file) });
    }
  }
  return ort.InferenceSession.create(await io.read(model.file), options);
}

async function feedOf(ort, job, io, number) {
  const feed = {};
  for (const input of job.feeds[number]) {
    const bytes = await io.read(input.file);
    let data;
    if (input.type === "string") {
      data = JSON.parse(new TextDecoder().decode(bytes));
    } else {
      const View = VIEWS[input.type];
      if (View === undefined) throw new Error(`input ${input.name}: no ${input.type} here`);
      data = new View(bytes.slice().buffer);
    }
    feed[input.name] = new ort.Tensor(input.type, data, input.dims);
  }
  return feed;
}

async function keep(job, io, index, number, raw, found) {
  const entry = [];
  for (const [name, tensor] of Object.entries(raw)) {
    if (tensor.type === undefined) throw new Error(`output ${name}: not a tensor`);
    const data = await tensor.getData();
    if (tensor.type.startsWith("float") && tensor.type !== "float16") {
      const note = `output '${name}' holds NaN or Inf`;
      if (!found.notes.includes(note) && !data.every(Number.isFinite)) found.notes.push(note);
    }
    if (job.outputs) {
      const file = `model${index}-${number}-${entry.length}.bin`;
      const text = tensor.type === "string";
      const bytes = text
        ? new TextEncoder().encode(JSON.stringify(data))
        : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
      await io.write(file, bytes);
      entry.push({ name, type: tensor.type, dims: tensor.dims, file });
    }
  }
  if (job.outputs) found.outputs.push(entry);
}

/** Load one model and run every sample. */
export async function solo(ort, job, io, index) {
  const found = { notes: [], outputs: [] };
  try {
    let start = io.now();
    const session = await load(ort, job, io, index);
    found.load_ns = io.now() - start;
    const count = job.outputs ? job.feeds.length : Math.min(job.feeds.length, job.most_feeds);
    for (let number = 0; number < count; number++) {
      const feed = await feedOf(ort, job, io, number);
      start = io.now();
      const raw = await session.run(feed);
      found.first_ns ??= io.now() - start;
      await keep(job, io, index, number, raw, found);
      await io.advance();
    }
    await session.release();
  } catch (error) {
    found.error = reason(error);
  }
  return found;
}

/** Which provider took which nodes, read from the verbose log; null where it does not say. */
export async function placement(ort, job, io, index, logged) {
  const before = ort.env.logLevel;
  ort.env.logLevel = "verbose";
  logged.length = 0;
  try {
    const verbose = { logSeverityLevel: 0, logVerbosityLevel: 0 };
    await (await load(ort, job, io, index, verbose)).release();
  } finally {
    ort.env.logLevel = before;
  }
  const nodes = {};
  let provider = null;
  for (const line of logged) {
    const all = line.match(/All nodes placed on \[(\w+)\]/);
    if (all) return { [all[1]]: null };
    const head = line.match(/Node\(s\) placed on \[(\w+)\]/);
    const node = line.match(/VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \((.*)\)\s*$/);
    if (head) nodes[(provider = head[1])] = [];
    else if (provider && node) nodes[provider].push(node[2] || node[1]);
  }
  return Object.keys(nodes).length ? nodes : null;
}

/** Time the models in turns; the order flips and turns, so that none is always second. */
export async function timing(ort, job, io, indexes) {
  const sessions = [];
  for (const index of indexes) sessions.push(await load(ort, job, io, index));
  const feeds = [];
  for (let number = 0; number < Math.min(job.feeds.length, job.most_feeds); number++) {
    feeds.push(await feedOf(ort, job, io, number));
    for (const session of sessions) await session.run(feeds[number]);
  }
  for (let number = 0; number < job.warmup; number++) {
    for (const session of sessions) await session.run(feeds[number % feeds.length]);
  }
  const times = sessions.map(() => []);
  for (let number = 0; number < job.iterations; number++) {
    const turn = Math.floor(number / 2) % sessions.length;
    const order = sessions.map((_, place) => (place + turn) % sessions.length);
    if (number % 2) order.reverse();
    for (const place of order) {
      const feed = feeds[number % feeds.length];
      const start = io.now();
      await sessions[place].run(feed);
      times[place].push(io.now() - start);
    }
    await io.advance();
  }
  return Object.fromEntries(indexes.map((index, place) => [index, times[place]]));
}
