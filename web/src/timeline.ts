// Streams side by side over time: when each node would run, or ran.

import { select } from "d3-selection";
import { zoom, zoomIdentity } from "d3-zoom";
import type { App } from "./app";
import { time, type Timeline } from "./data";
import { button, h, svg } from "./svg";

const LANE = 30;
const LEFT = 84;

export class TimelinePanel {
  readonly root = h("section", { class: "timeline", "aria-label": "stream timeline" });
  private readonly canvas = svg("svg");
  private readonly choice = h("select", { "aria-label": "which timeline" });
  private shown = 0;
  private scale = zoomIdentity;
  private readonly zooming = zoom<SVGSVGElement, unknown>().scaleExtent([1, 400]);

  constructor(private readonly app: App, close: () => void) {
    const { timelines, profile } = app.page;
    timelines.forEach((t, i) => this.choice.append(h("option", { value: i }, t.title)));
    this.choice.addEventListener("change", () => {
      this.shown = Number(this.choice.value);
      this.draw();
    });
    // A graph that is one loop tells more by a turn of it.
    this.shown = Math.max(0, this.costliest());
    this.choice.value = String(this.shown);
    const copy = (app.page.bandwidth / 1e9).toFixed(0);
    const how = profile ? "measured, node by node" : `estimated: tables of kernels, else bytes at ${copy} GB/s`;
    const head = h("header", {}, h("b", {}, "Streams"), this.choice, h("span", { class: "dim" }, how), button("×", close, { "aria-label": "close the timeline", class: "close" }));
    this.root.append(head, this.canvas);
    this.zooming.on("zoom", (event) => {
      this.scale = event.transform;
      this.draw();
    });
    select(this.canvas).call(this.zooming);
  }

  private costliest(): number {
    const [first, ...rest] = this.app.page.timelines;
    if (!first || first.bars.length > 8) return 0;
    let best = 0, most = 0;
    rest.forEach((t, i) => { if (t.bars.length > most) [best, most] = [i + 1, t.bars.length]; });
    return best;
  }

  draw(): void {
    const timeline = this.app.page.timelines[this.shown];
    if (!timeline) return;
    const { model } = this.app.stage(this.app.stages.length - 1);
    const streams = [...new Set(timeline.bars.map(([, stream]) => stream))].sort();
    const total = end(timeline);
    const width = (this.canvas.getBoundingClientRect().width || 800) - LEFT - 16;
    this.zooming.translateExtent([[0, 0], [width + LEFT, 1e6]]).extent([[0, 0], [width + LEFT, 100]]);
    const { k, x } = this.scale;
    const px = (microseconds: number) => LEFT + (microseconds / total) * width * k + x * 1;
    const height = streams.length * LANE + 26;
    this.canvas.setAttribute("height", String(height));
    const chosen = new Set(this.app.selected && "track" in this.app.selected ? this.app.lineage(this.app.selected.track).at(-1) : []);
    const bars = svg("g", { "clip-path": "url(#lanes)" });
    for (const [track, stream, start, length] of timeline.bars) {
      const [a, b] = [px(start), px(start + length)];
      if (b < LEFT || a > LEFT + width) continue;
      const lane = streams.indexOf(stream);
      const node = model.graph.nodes[model.byTrack.get(track)!];
      const bar = svg(
        "g", { class: `bar s${lane % 6}${chosen.has(track) ? " selected" : ""}`, "data-track": track },
        svg("title", {}, `${node?.op ?? ""} ${node?.o[0]?.[0] ?? ""}: ${time(length * 1e-6)} from ${time(start * 1e-6)} on stream ${stream}`),
        svg("rect", { x: a, y: lane * LANE + 4, width: Math.max(b - a - 0.6, 0.8), height: LANE - 8, rx: Math.min(3, (b - a) / 3) }),
      );
      if (node && b - a > 7 * node.op.length + 6) bar.append(svg("text", { x: Math.max(a, LEFT) + 5, y: lane * LANE + 19 }, node.op));
      bar.addEventListener("click", () => this.app.select({ track }));
      bars.append(bar);
    }
    const names = streams.map((stream, i) => svg("text", { class: "lane-name", x: 10, y: i * LANE + 19 }, `stream ${stream}`));
    const clip = svg("clipPath", { id: "lanes" }, svg("rect", { x: LEFT, y: 0, width, height }));
    this.canvas.replaceChildren(clip, ...this.axis(total, width, streams.length * LANE, px), ...names, bars);
  }

  private axis(total: number, width: number, y: number, px: (t: number) => number): SVGElement[] {
    const wanted = total / this.scale.k / 8;
    const power = 10 ** Math.floor(Math.log10(wanted));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= wanted)!;
    const marks: SVGElement[] = [];
    const first = Math.max(0, Math.floor(((LEFT - px(0)) / (width * this.scale.k)) * total / step));
    for (let i = first; i <= first + 12 && i * step <= total; i++) {
      const at = px(i * step);
      if (at < LEFT - 1 || at > LEFT + width) continue;
      marks.push(svg("line", { class: "tick", x1: at, x2: at, y1: 0, y2: y + 4 }));
      marks.push(svg("text", { class: "tick-text", x: at, y: y + 17 }, i ? time(i * step * 1e-6) : "0"));
    }
    return marks;
  }
}

function end(timeline: Timeline): number {
  return timeline.bars.reduce((most, [, , start, length]) => Math.max(most, start + length), 0) || 1;
}
