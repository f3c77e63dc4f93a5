// Places what a group holds: dagre for what is connected, rows for what is not.

import dagre from "@dagrejs/dagre";
import { describe, measure } from "./labels";
import type { Box, Model } from "./model";

export interface Point { x: number; y: number }

export interface Placed {
  id: string;
  x: number; // top left, within the group
  y: number;
  width: number;
  height: number;
  inner?: Layout; // of an open group, `shift` from its left
  shift?: number;
}

export interface Layout {
  width: number;
  height: number;
  items: Placed[];
  edges: { from: string; to: string; points: Point[] }[];
}

export const HEADER = 34;
const PADDING = 14;
const GAP = 22;

type Size = { width: number; height: number; inner?: Layout; shift?: number };

export class Layouter {
  private readonly kept = new Map<string, Layout>();

  constructor(private readonly model: Model) {}

  // The layout of a box whose inner groups are open where `open` holds their keys.
  of(box: Box, open: ReadonlySet<string>): Layout {
    const sizes = new Map<string, Size>();
    const opened: string[] = [];
    for (const id of box.items) {
      const inner = this.model.boxById(id);
      if (inner && open.has(inner.key)) {
        const layout = this.of(inner, open);
        const width = Math.max(layout.width, measure(describe(this.model, id)).width);
        const shift = (width - layout.width) / 2;
        sizes.set(id, { width, height: layout.height + HEADER, inner: layout, shift });
        opened.push(`${id}:${width}x${layout.height}`);
      } else sizes.set(id, measure(describe(this.model, id, box)));
    }
    const name = `${box.id} ${opened.join(" ")}`;
    const known = this.kept.get(name);
    if (known) {
      for (const item of known.items) item.inner = sizes.get(item.id)?.inner;
      return known;
    }
    for (const port of box.ports.values()) sizes.set(port.id, measure(describe(this.model, port.id, box)));
    if (box.yieldsShown) sizes.set("y", measure(describe(this.model, "y", box)));
    const layout = arrange(sizes, [...box.edges.values()]);
    this.kept.set(name, layout);
    return layout;
  }
}

// Layers that are alike look alike: what was placed for one serves the others.
const placed = new Map<string, { ids: string[]; layout: Layout }>();

function arrange(sizes: Map<string, Size>, edges: { from: string; to: string }[]): Layout {
  const ids = [...sizes.keys()];
  const place = new Map(ids.map((id, i) => [id, i]));
  const form = [...sizes.values()].map(({ width, height }) => `${width}x${height}`);
  const key = `${form} ${edges.map((e) => `${place.get(e.from)}>${place.get(e.to)}`)}`;
  let known = placed.get(key);
  if (!known) {
    known = { ids, layout: arranged(sizes, edges) };
    placed.set(key, known);
  }
  const now = new Map(known.ids.map((id, i) => [id, ids[i]]));
  const items = known.layout.items.map((item) => {
    const id = now.get(item.id)!;
    return { ...item, id, inner: sizes.get(id)!.inner, shift: sizes.get(id)!.shift };
  });
  const lines = known.layout.edges.map((e) => ({ from: now.get(e.from)!, to: now.get(e.to)!, points: e.points }));
  return { ...known.layout, items, edges: lines };
}

function arranged(sizes: Map<string, Size>, edges: { from: string; to: string }[]): Layout {
  const parts = components([...sizes.keys()], edges).map((ids) => {
    const held = new Set(ids);
    return run(ids, sizes, edges.filter((e) => held.has(e.from)));
  });
  return parts.length === 1 ? padded(parts[0]) : padded(inRows(parts));
}

function components(ids: string[], edges: { from: string; to: string }[]): string[][] {
  const boss = new Map(ids.map((id) => [id, id]));
  const find = (id: string): string => {
    let at = id;
    while (boss.get(at) !== at) {
      boss.set(at, boss.get(boss.get(at)!)!);
      at = boss.get(at)!;
    }
    return at;
  };
  for (const edge of edges) boss.set(find(edge.from), find(edge.to));
  const parts = new Map<string, string[]>();
  for (const id of ids) {
    const part = parts.get(find(id));
    if (part) part.push(id);
    else parts.set(find(id), [id]);
  }
  return [...parts.values()];
}

function run(ids: string[], sizes: Map<string, Size>, edges: { from: string; to: string }[]): Layout {
  if (ids.length === 1) {
    const size = sizes.get(ids[0])!;
    return { ...size, items: [{ id: ids[0], x: 0, y: 0, ...size }], edges: [] };
  }
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 18, ranksep: 30, edgesep: 10, ranker: "tight-tree" });
  graph.setDefaultEdgeLabel(() => ({}));
  for (const id of ids) graph.setNode(id, { width: sizes.get(id)!.width, height: sizes.get(id)!.height });
  for (const { from, to } of edges) graph.setEdge(from, to);
  dagre.layout(graph);
  const items = ids.map((id) => {
    const { x, y } = graph.node(id) as Point;
    const size = sizes.get(id)!;
    return { id, x: x - size.width / 2, y: y - size.height / 2, ...size };
  });
  const lines = edges.map(({ from, to }) => ({ from, to, points: graph.edge(from, to).points as Point[] }));
  const { width, height } = graph.graph() as { width: number; height: number };
  return { width, height, items, edges: lines };
}

// Parts that have nothing to do with one another, as on a page of text.
function inRows(parts: Layout[]): Layout {
  const area = parts.reduce((sum, part) => sum + (part.width + GAP) * (part.height + GAP), 0);
  const limit = Math.max(Math.sqrt(area) * 1.4, ...parts.map((part) => part.width));
  const all: Layout = { width: 0, height: 0, items: [], edges: [] };
  let x = 0, y = 0, tall = 0;
  for (const part of parts) {
    if (x > 0 && x + part.width > limit) [x, y, tall] = [0, y + tall + GAP, 0];
    shift(part, x, y, all);
    x += part.width + GAP;
    tall = Math.max(tall, part.height);
  }
  return all;
}

function padded(layout: Layout): Layout {
  const all: Layout = { width: 0, height: 0, items: [], edges: [] };
  shift(layout, PADDING, PADDING, all);
  return { ...all, width: all.width + PADDING, height: all.height + PADDING };
}

function shift(part: Layout, x: number, y: number, into: Layout): void {
  for (const item of part.items) into.items.push({ ...item, x: item.x + x, y: item.y + y });
  for (const edge of part.edges) {
    into.edges.push({ ...edge, points: edge.points.map((p) => ({ x: p.x + x, y: p.y + y })) });
  }
  into.width = Math.max(into.width, x + part.width);
  into.height = Math.max(into.height, y + part.height);
}
