// What stands in a box, and how much room it takes.

import type { Box, Model } from "./model";

export interface Label {
  kind: "node" | "group" | "pill" | "view";
  title: string;
  lines: string[];
  badge: string; // the kernel, or how many operations a group holds
}

const LONGEST = 34;
const VIEWS = new Set(
  ("reshape transpose squeeze expand_dims broadcast_to getitem flatten unflatten moveaxis swapaxes view " +
    "contiguous astype").split(" "),
);

export function describe(model: Model, id: string, box?: Box): Label {
  const { nodes } = model.graph;
  if (id === "y") {
    const names = shortList(box!.yields, 4);
    return { kind: "pill", title: `${box!.group ? "yield" : "return"} ${names}`, lines: [], badge: "" };
  }
  if (id === "i") {
    return { kind: "pill", title: clip(shortList(box!.inputs, 3)), lines: [], badge: "" };
  }
  if (id[0] === "p") {
    const { node, output } = box!.ports.get(id)!;
    return { kind: "pill", title: node.o[output][0], lines: [], badge: "" };
  }
  const inner = model.boxById(id);
  if (inner) {
    const { kind, label, node } = inner.group!;
    const record = kind === "loop" ? nodes[node!] : undefined;
    const results = record ? shortList(record.o.map(([name, type]) => `${name} ${type}`), 2) : "";
    return { kind: "group", title: label, lines: results ? [clip(results)] : [], badge: inner.count === 1 ? "1 op" : `${inner.count} ops` };
  }
  const node = nodes[Number(id.slice(1))];
  if (node.op === "input") {
    return { kind: "pill", title: clip(node.o[0][0]), lines: [node.o[0][1]], badge: "" };
  }
  const results = node.o.length > 1 ? `${node.o[0][0]} and ${node.o.length - 1} more` : node.o[0].slice(0, 2).join(" ");
  const weights = model.weights(node);
  const lines = [clip(results), ...(weights.length ? [clipLeft(weights[0])] : [])];
  return { kind: VIEWS.has(node.op) ? "view" : "node", title: node.op, lines, badge: node.k ?? "" };
}

const canvas = document.createElement("canvas").getContext("2d")!;
const widths = new Map<string, number>();

export function textWidth(text: string, font: string): number {
  const key = font + text;
  let width = widths.get(key);
  if (width === undefined) {
    canvas.font = font;
    width = canvas.measureText(text).width;
    widths.set(key, width);
  }
  return width;
}

export const TITLE = '600 12.5px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif';
export const MONO = '11px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';

export function measure(label: Label): { width: number; height: number } {
  const pill = label.kind === "pill";
  const title = textWidth(label.title, pill ? MONO : TITLE);
  const badge = label.badge ? textWidth(label.badge, MONO) + 18 : 0;
  const chevron = label.kind === "group" ? 16 : 0;
  const widest = Math.max(title + badge + chevron, ...label.lines.map((line) => textWidth(line, MONO)));
  const width = 12 * Math.ceil((widest + 22) / 12); // in steps, so that layers alike are placed alike
  return { width, height: (pill ? 22 : 30) + 15 * label.lines.length };
}

export function clip(text: string): string {
  return text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text;
}

// Of a path the end tells more than the beginning.
export function clipLeft(text: string): string {
  return text.length > LONGEST ? `…${text.slice(1 - LONGEST)}` : text;
}

export function shortList(items: string[], most: number): string {
  const rest = items.length - most;
  return rest > 0 ? `${items.slice(0, most).join(", ")}, … ${rest} more` : items.join(", ");
}
