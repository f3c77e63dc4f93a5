// The data of the page as Python writes it (qgraph/inspection/viewer/page.py), and how to read it.

export interface NodeRecord {
  t: number; // track: the same node through all passes
  op: string;
  o: [name: string, type: string, bytes: number][]; // results
  i: [node: number, output: number][]; // what it reads
  p: number; // group, -1 at the top
  l?: number; // line of the source, from 1
  m?: string; // the pass that made it
  k?: string; // kernel
  s?: string; // stream
  g?: string; // stage, "" is run
  v?: number; // an input of a body that stands for a value from outside
  b?: number; // bytes moved
  f?: number; // operations
  c?: string; // the call as text
  a?: Record<string, string>; // settings
}

export interface GroupRecord {
  kind: "stage" | "loop" | "body" | "block" | "part";
  label: string;
  parent: number;
  node?: number; // of a loop
  yields?: [number, number][];
}

export interface GraphRecord {
  groups: GroupRecord[];
  nodes: NodeRecord[];
  outputs: [number, number][];
}

export interface Change {
  out: number[];
  in: number[];
  moved: number[];
  altered: number[];
  why: string[];
}

export interface StepRecord {
  name: string;
  contract?: string;
  summary?: string;
  changes?: Change[];
  replaced?: [old: number, now: number][];
  refused?: [line: number, op: string, reason: string][];
  graph?: GraphRecord;
}

export interface Timeline {
  title: string;
  times: number; // how often it runs in one call
  bars: [track: number, stream: string, start: number, length: number][]; // microseconds
}

export interface Profile {
  seconds: number;
  total: number;
  bandwidth: number;
  rows: [track: number, seconds: number, times: number, bytes: number, estimate: number][];
}

export interface Page {
  name: string;
  target: string;
  bandwidth: number;
  steps: StepRecord[];
  lines: [place: string, source: string][];
  timelines: Timeline[];
  profile?: Profile;
}

export async function read(base64: string): Promise<Page> {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(plain).text()) as Page;
}

export function bytes(count: number): string {
  const units: [number, string][] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];
  for (const [size, unit] of units) if (count >= size) return `${(count / size).toFixed(1)} ${unit}`;
  return `${count} B`;
}

export function flops(count: number): string {
  const units: [number, string][] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
  for (const [size, unit] of units) if (count >= size) return `${(count / size).toFixed(1)} ${unit}FLOP`;
  return `${count} FLOP`;
}

export function time(seconds: number): string {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return seconds >= 1e-3 ? `${(seconds * 1e3).toFixed(2)} ms` : `${(seconds * 1e6).toFixed(1)} µs`;
}

export function rate(bytesPerSecond: number): string {
  return bytesPerSecond >= 1e9 ? `${(bytesPerSecond / 1e9).toFixed(1)} GB/s` : `${(bytesPerSecond / 1e6).toFixed(1)} MB/s`;
}
