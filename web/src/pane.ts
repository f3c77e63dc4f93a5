// One graph: draws it, pans and zooms, and shows what is selected.

import { select } from "d3-selection";
import "d3-transition";
import { zoom, zoomIdentity, type ZoomBehavior } from "d3-zoom";
import type { App, Side } from "./app";
import { drawLayout } from "./draw";
import type { Layout } from "./layout";
import { HEADER } from "./layout";
import { h, svg } from "./svg";

interface Spot { x: number; y: number; width: number; height: number }

export class Pane {
  readonly root: HTMLElement;
  private readonly canvas = svg("svg", { class: "graph" });
  private readonly world = svg("g");
  private readonly links = svg("g", { class: "links" });
  private readonly title = h("div", { class: "pane-title" });
  private readonly zooming: ZoomBehavior<SVGSVGElement, unknown>;
  private spots = new Map<string, Spot>();
  private layout?: Layout;
  private step = "";

  constructor(private readonly app: App, readonly side: Side) {
    this.root = h("section", { class: `pane ${side}`, tabindex: 0 }, this.title, this.canvas);
    this.canvas.append(this.world);
    this.zooming = zoom<SVGSVGElement, unknown>()
      .scaleExtent([0.02, 3])
      .on("zoom", (event) => this.world.setAttribute("transform", event.transform.toString()));
    select(this.canvas).call(this.zooming).on("dblclick.zoom", null);
    this.canvas.addEventListener("click", (event) => this.click(event));
    this.canvas.addEventListener("dblclick", (event) => this.unfold(event));
  }

  draw(): void {
    const { step, model, layouter } = this.app.side(this.side);
    const anchor = this.anchor();
    this.layout = layouter.of(model.top, this.app.open);
    this.spots = new Map();
    collect(this.layout, 0, 0, this.spots);
    this.world.replaceChildren(...drawLayout(this.app, this.side, this.layout, model.top), this.links);
    const place = this.app.both ? (this.side === "before" ? "Before" : "After") : "Graph";
    this.title.replaceChildren(h("b", {}, place), ` ${step.name}`, h("span", {}, `${model.top.count} ops`));
    this.root.setAttribute("aria-label", `${place}: ${step.name}`);
    if (this.step === "" || this.app.fresh) this.fit(false);
    else if (this.step === step.name) this.keep(anchor);
    this.step = step.name;
    this.mark();
  }

  // Show the selection, and the edges to what it reads and what reads it.
  mark(): void {
    for (const old of this.world.querySelectorAll(".selected, .near")) old.classList.remove("selected", "near");
    this.links.replaceChildren();
    const { model } = this.app.side(this.side);
    const ids = this.selectedIds();
    for (const id of ids) {
      this.element(id)?.classList.add("selected");
      if (id[0] !== "n" && !model.boxById(id)?.group?.node) continue;
      const node = id[0] === "n" ? Number(id.slice(1)) : model.boxById(id)!.group!.node!;
      const inStage = Boolean(model.graph.nodes[node].g);
      for (const [source] of model.graph.nodes[node].i) {
        if (inStage || !model.isWeight(source)) this.link(model.source(source), node, "reads");
      }
      for (const user of model.users[node]) this.link(node, user, "read"); // of a packed weight too
    }
  }

  selectedIds(): string[] {
    const { selected } = this.app;
    const { model } = this.app.side(this.side);
    if (!selected) return [];
    if ("key" in selected) {
      const box = model.boxByKey(selected.key);
      return box ? [box.id] : [];
    }
    const nodes = this.app.tracks(selected.track, this.side).map((t) => model.byTrack.get(t)!);
    return nodes.flatMap((node) => (model.isDrawn(node) ? [this.shown(node)] : model.users[node].map((u) => this.shown(u))));
  }

  // The item that shows a node: itself, or the folded group that holds it.
  private shown(node: number): string {
    const { model } = this.app.side(this.side);
    let id = model.item(node);
    for (const box of model.around(node)) {
      if (box.group && !this.spots.has(id)) id = box.id;
    }
    return id;
  }

  private link(from: number, to: number, kind: string): void {
    const [a, b] = [this.spots.get(this.shown(from)), this.spots.get(this.shown(to))];
    if (!a || !b || a === b) return;
    this.element(this.shown(kind === "reads" ? from : to))?.classList.add("near");
    const [x1, y1, x2, y2] = [a.x + a.width / 2, a.y + a.height, b.x + b.width / 2, b.y];
    const bend = Math.max(30, Math.abs(y2 - y1) / 2);
    const path = `M${x1},${y1} C${x1},${y1 + bend} ${x2},${y2 - bend} ${x2},${y2}`;
    this.links.append(svg("path", { d: path, class: kind, "marker-end": "url(#arrow-strong)" }));
  }

  private element(id: string): Element | null {
    return this.world.querySelector(`[data-id="${CSS.escape(id)}"]`);
  }

  // Bring the selection into view if it is not there.
  show(): void {
    const spot = this.spots.get(this.selectedIds()[0]);
    if (!spot) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    const t = this.transform();
    const [x, y] = [spot.x * t.k + t.x, spot.y * t.k + t.y];
    const inside = x > 0 && y > 40 && x + spot.width * t.k < width && y + Math.min(spot.height, 60) * t.k < height;
    if (inside && t.k > 0.35) return;
    const k = Math.max(t.k, 0.8);
    const middle = Math.min(spot.height * k, height - 120) / 2;
    const goal = zoomIdentity
      .translate(width / 2 - (spot.x + spot.width / 2) * k, height / 2 - middle - spot.y * k)
      .scale(k);
    select(this.canvas).transition().duration(250).call(this.zooming.transform, goal);
  }

  fit(moving = true): void {
    if (!this.layout) return;
    const { width, height } = this.canvas.getBoundingClientRect();
    if (!width) return;
    const whole = Math.min(width / this.layout.width, (height - 50) / this.layout.height, 1.1);
    const k = moving ? whole : Math.max(whole, 0.7);
    const first = this.app.side(this.side).model.boxes.find((box) => box.group?.kind === "block" && this.spots.has(box.id));
    const spot = (k > whole && this.layout.width * k > width && first && this.spots.get(first.id)) || { x: 0, width: this.layout.width };
    const goal = zoomIdentity.translate(width / 2 - (spot.x + spot.width / 2) * k, 44).scale(k);
    const canvas = select(this.canvas);
    if (moving) canvas.transition().duration(250).call(this.zooming.transform, goal);
    else canvas.call(this.zooming.transform, goal);
  }

  zoomBy(factor: number): void { select(this.canvas).transition().duration(120).call(this.zooming.scaleBy, factor); }

  private transform(): { x: number; y: number; k: number } {
    return (this.canvas as unknown as { __zoom?: { x: number; y: number; k: number } }).__zoom ?? zoomIdentity;
  }

  // What was folded or unfolded stays where it is on the screen.
  private anchor(): { id: string; x: number; y: number } | undefined {
    const id = this.app.side(this.side).model.boxByKey(this.app.toggled)?.id;
    const spot = id === undefined ? undefined : this.spots.get(id);
    return spot && { id: id!, x: spot.x + spot.width / 2, y: spot.y };
  }

  private keep(anchor: { id: string; x: number; y: number } | undefined): void {
    const spot = anchor && this.spots.get(anchor.id);
    if (!anchor || !spot) return;
    const { x, y, k } = this.transform();
    const [dx, dy] = [anchor.x - spot.x - spot.width / 2, anchor.y - spot.y];
    select(this.canvas).call(this.zooming.transform, zoomIdentity.translate(x + dx * k, y + dy * k).scale(k));
  }

  private hit(event: Event): string | undefined {
    return (event.target as Element).closest<SVGElement>("[data-id]")?.dataset.id;
  }

  private click(event: MouseEvent): void {
    const id = this.hit(event);
    const { model } = this.app.side(this.side);
    if (id === undefined) return this.app.select(undefined);
    const box = model.boxById(id);
    if (box && (event.target as Element).closest(".chevron")) return this.app.toggle(box.key);
    if (id[0] === "p") return this.app.select({ track: model.graph.nodes[parseInt(id.slice(1), 10)].t });
    if (id[0] === "n") return this.app.select({ track: model.graph.nodes[Number(id.slice(1))].t });
    if (box?.group) this.app.select({ key: box.key });
  }

  private unfold(event: MouseEvent): void {
    const id = this.hit(event);
    const box = id === undefined ? undefined : this.app.side(this.side).model.boxById(id);
    if (box?.group) this.app.toggle(box.key);
  }
}

function collect(layout: Layout, x: number, y: number, spots: Map<string, Spot>): void {
  for (const item of layout.items) {
    spots.set(item.id, { x: x + item.x, y: y + item.y, width: item.width, height: item.height });
    if (item.inner) collect(item.inner, x + item.x + (item.shift ?? 0), y + item.y + HEADER, spots);
  }
}
