// A layout as SVG.

import type { App, Side, Status } from "./app";
import { HEADER, type Layout, type Placed, type Point } from "./layout";
import { describe, MONO, textWidth } from "./labels";
import type { Box } from "./model";
import { svg } from "./svg";

export function drawLayout(app: App, side: Side, layout: Layout, box: Box): SVGElement[] {
  const edges = layout.edges.map(({ from, to, points }) =>
    svg("path", { d: curve(points), class: from[0] === "p" || to === "y" ? "edge faint" : "edge", "marker-end": "url(#arrow)" }),
  );
  return [...edges, ...layout.items.map((item) => draw(app, side, item, box))];
}

function draw(app: App, side: Side, item: Placed, box: Box): SVGElement {
  const { model } = app.side(side);
  const label = describe(model, item.id, box);
  const inner = model.boxById(item.id);
  const tracks = inner ? inner.tracks : item.id[0] === "n" ? [model.graph.nodes[Number(item.id.slice(1))].t] : [];
  const status = inner ? groupStatus(app, side, tracks) : tracks.length ? app.status(tracks[0], side) : "";
  const record = item.id[0] === "n" ? model.graph.nodes[Number(item.id.slice(1))] : undefined;
  const classes = ["item", label.kind, inner?.group?.kind, item.inner && "open", app.colours === "changes" && status];
  const share = app.colours === "time" ? tracks.reduce((sum, t) => sum + (app.shares.get(t) ?? 0), 0) : 0;
  const heat = share > 0 && !item.inner ? `--heat:${(100 * Math.sqrt(Math.min(1, share))).toFixed(1)}%` : undefined;
  const stream = app.colours === "streams" && record?.s ? `stream s${Number(record.s) % 6 || 0}` : "";
  const { width, height } = item;
  const group = svg(
    "g",
    {
      class: [...classes, heat && "hot", stream].filter(Boolean).join(" "),
      transform: `translate(${item.x},${item.y})`,
      "data-id": item.id,
      style: heat,
      role: "img",
      "aria-label": [label.title, ...label.lines, label.badge].filter(Boolean).join(", "),
    },
    svg("rect", { class: "body", width, height, rx: label.kind === "pill" ? 11 : 7 }),
  );
  if (stream && record) group.append(svg("rect", { class: "lane", width: 4, height: height - 10, x: 4, y: 5, rx: 2 }));
  if (inner) group.append(chevron(Boolean(item.inner)));
  const left = inner ? 28 : 13;
  const middle = label.kind === "pill" && !label.lines.length;
  group.append(svg("text", { class: "title", x: left, y: middle ? height / 2 + 4 : label.kind === "pill" ? 16 : 20 }, label.title));
  if (!item.inner) {
    label.lines.forEach((line, i) => {
      const y = (label.kind === "pill" ? 31 : 36) + 15 * i;
      group.append(svg("text", { class: i ? "line weight" : "line", x: 13, y }, line));
    });
  }
  if (label.badge) group.append(...pillText(label.badge, width, inner ? "count" : "kernel"));
  if (share >= 0.0005) group.append(...marks([["share", percent(share)]], width));
  if (inner && app.colours === "changes" && !item.inner) group.append(...marks(changeCounts(app, side, tracks), width));
  if (item.inner && inner) {
    const content = svg("g", { transform: `translate(${item.shift ?? 0},${HEADER})` });
    content.append(...drawLayout(app, side, item.inner, inner));
    group.append(content);
  }
  return group;
}

function percent(share: number): string { return share >= 0.1 ? `${(100 * share).toFixed(0)}%` : `${(100 * share).toFixed(1)}%`; }

function chevron(open: boolean): SVGElement {
  return svg(
    "g",
    { class: "chevron", role: "button", "aria-label": open ? "fold" : "unfold" },
    svg("rect", { x: 4, y: 4, width: 22, height: 24, fill: "transparent" }),
    svg("path", { d: open ? "M10,13 l5,6 l5,-6" : "M12,11 l6,5 l-6,5" }),
  );
}

function pillText(text: string, right: number, kind: string): SVGElement[] {
  const width = textWidth(text, MONO) + 10;
  return [
    svg("rect", { class: `badge ${kind}`, x: right - width - 7, y: 7, width, height: 16, rx: 8 }),
    svg("text", { class: "badge-text", x: right - width - 2, y: 19 }, text),
  ];
}

// How many nodes inside a folded group go, come or change.
function changeCounts(app: App, side: Side, tracks: number[]): [kind: string, text: string][] {
  const counts = { gone: 0, new: 0, changed: 0 };
  for (const track of tracks) {
    const status = app.status(track, side);
    if (status) counts[status] += 1;
  }
  const signs = { changed: "~", new: "+", gone: "−" } as const;
  const kinds = Object.keys(signs) as (keyof typeof signs)[];
  return kinds.filter((kind) => counts[kind]).map((kind) => [kind, `${signs[kind]}${counts[kind]}`]);
}

// Small labels on the upper border, from the right.
function marks(labels: [kind: string, text: string][], width: number): SVGElement[] {
  let x = width - 4;
  return labels.flatMap(([kind, text]) => {
    x -= textWidth(text, MONO) + 14;
    return [
      svg("rect", { class: `mark ${kind}`, x, y: -9, width: textWidth(text, MONO) + 12, height: 16, rx: 8 }),
      svg("text", { class: "mark-text", x: x + 6, y: 3 }, text),
    ];
  });
}

function groupStatus(app: App, side: Side, tracks: number[]): Status {
  const first = tracks.length ? app.status(tracks[0], side) : "";
  return first !== "" && first !== "changed" && tracks.every((t) => app.status(t, side) === first) ? first : "";
}

// A line through the middles of a route's stretches, its corners rounded.
function curve(points: Point[]): string {
  const spot = (p: Point) => `${p.x.toFixed(1)},${p.y.toFixed(1)}`;
  const mid = (a: Point, b: Point) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 });
  let path = `M${spot(points[0])}`;
  for (let i = 1; i < points.length - 1; i++) {
    const end = i === points.length - 2 ? points[i + 1] : mid(points[i], points[i + 1]);
    path += ` Q${spot(points[i])} ${spot(end)}`;
  }
  return points.length > 2 ? path : `${path} L${spot(points[1])}`;
}
