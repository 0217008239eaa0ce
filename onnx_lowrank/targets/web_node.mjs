// node web_node.mjs FOLDER PACKAGE solo INDEX | timing INDEX…: see web.py and web_core.mjs.

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

import { begin, reason, solo, timing } from "./web_core.mjs";

const [folder, library, work, ...words] = process.argv.slice(2);
const indexes = words.map(Number);
const result = path.join(folder, "result");
const io = {
  read: async (name) => new Uint8Array(fs.readFileSync(path.resolve(folder, name))),
  write: async (name, bytes) => fs.writeFileSync(path.join(result, name), bytes),
  advance: () => fs.writeSync(1, "advance\n"),
  now: () => Number(process.hrtime.bigint()),
};

function peakBytes() {
  try {
    const status = fs.readFileSync("/proc/self/status", "utf8");
    return Number(status.match(/VmHWM:\s+(\d+)/)[1]) * 1024;
  } catch {
    return null;
  }
}

process.stdin.on("end", () => process.exit(4)).resume(); // whoever started this is gone
try {
  const job = JSON.parse(fs.readFileSync(path.join(folder, "job.json"), "utf8"));
  const ort = await import(pathToFileURL(path.join(library, "dist", "ort.node.min.mjs")).href);
  ort.env.logLevel = "error";
  if (job.threads) ort.env.wasm.numThreads = job.threads;
  await begin(ort, job);
  let name = "timing.json";
  let found;
  if (work === "solo") {
    name = `model${indexes[0]}.json`;
    found = await solo(ort, job, io, indexes[0]);
    found.peak_bytes = peakBytes();
  } else {
    found = await timing(ort, job, io, indexes);
  }
  fs.writeFileSync(path.join(result, name), JSON.stringify(found));
  process.exit(0);
} catch (error) {
  fs.writeSync(2, `${reason(error)}\n`);
  process.exit(2);
}
