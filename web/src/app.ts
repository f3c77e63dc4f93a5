// The state of the page and what follows from it; everything else draws and changes it.

import type { Page, StepRecord } from "./data";
import { Layouter } from "./layout";
import { Model } from "./model";

export type Selection = { track: number } | { key: string } | undefined;
export type Colours = "changes" | "streams" | "time";
export type Side = "before" | "after";
export type Status = "" | "gone" | "new" | "changed";

const MOST_SHOWN = 4000;

export interface Stage {
  step: StepRecord;
  model: Model;
  layouter: Layouter;
}

export class App {
  before = 0;
  after: number;
  both: boolean;
  selected: Selection;
  colours: Colours;
  toggled = ""; // the group that was folded or unfolded last
  fresh = false; // all was folded or unfolded: look at it from the start
  readonly open = new Set<string>();
  readonly stages: number[]; // places in page.steps of those with a graph
  readonly shares = new Map<number, number>(); // part of the time, by track
  private readonly built = new Map<number, Stage>();
  private readonly listeners: ((what: "view" | "selection") => void)[] = [];

  constructor(readonly page: Page) {
    this.stages = page.steps.flatMap((step, i) => (step.graph ? [i] : []));
    this.after = this.stages.length - 1;
    this.both = this.stages.length > 1;
    this.colours = page.profile ? "time" : "changes";
    this.openSmall();
    this.share();
  }

  // Unfold what there is room for: a small graph whole, else the loops around its layers.
  private openSmall(): void {
    for (const index of new Set([this.before, this.after])) {
      const { boxes } = this.stage(index).model;
      const whole = boxes[boxes.length - 1].count <= 60;
      for (const box of boxes) {
        const { kind } = box.group ?? { kind: "" };
        if (whole || kind === "loop" || kind === "body") this.open.add(box.key);
      }
    }
  }

  private share(): void {
    const spent = new Map<number, number>();
    const add = (track: number, seconds: number) => spent.set(track, (spent.get(track) ?? 0) + seconds);
    if (this.page.profile) for (const [track, seconds] of this.page.profile.rows) add(track, seconds);
    else {
      const loops = new Set<number>();
      const { graph } = this.stage(this.after).model;
      for (const group of graph.groups) if (group.kind === "loop") loops.add(graph.nodes[group.node!].t);
      for (const { bars, times } of this.page.timelines) {
        for (const [track, , , length] of bars) if (!loops.has(track)) add(track, length * times);
      }
    }
    const total = [...spent.values()].reduce((a, b) => a + b, 0) || 1;
    for (const [track, seconds] of spent) this.shares.set(track, seconds / total);
  }

  stage(index: number): Stage {
    let stage = this.built.get(index);
    if (!stage) {
      const step = this.page.steps[this.stages[index]];
      const model = new Model(step.graph!);
      stage = { step, model, layouter: new Layouter(model) };
      this.built.set(index, stage);
    }
    return stage;
  }

  side(side: Side): Stage { return this.stage(side === "before" ? this.before : this.after); }

  onChange(listener: (what: "view" | "selection") => void): void { this.listeners.push(listener); }

  private tell(what: "view" | "selection"): void { for (const listener of this.listeners) listener(what); }

  select(selected: Selection, reveal = true): void {
    this.selected = selected;
    if (reveal && selected && this.reveal(selected)) this.tell("view");
    else this.tell("selection");
  }

  compare(before: number, after: number): void {
    this.before = Math.max(0, before);
    this.after = after;
    if (this.selected) this.reveal(this.selected);
    this.tell("view");
  }

  set(change: Partial<Pick<App, "both" | "colours">>): void {
    Object.assign(this, change);
    this.tell("view");
  }

  toggle(key: string): void {
    this.toggled = key;
    if (!this.open.delete(key)) this.open.add(key);
    this.tell("view");
  }

  fold(all: boolean): void {
    this.open.clear();
    this.fresh = true;
    if (!all) for (const side of ["before", "after"] as const) this.openMost(this.side(side).model);
    this.tell("view");
  }

  // The outer groups first, and no more than a browser can draw in a few seconds.
  private openMost(model: Model): void {
    let shown = 0;
    for (let boxes = [model.top]; boxes.length; ) {
      shown += boxes.reduce((sum, box) => sum + box.items.length + box.ports.size, 0);
      if (shown > MOST_SHOWN) return;
      for (const box of boxes) this.open.add(box.key);
      boxes = boxes.flatMap((box) => box.items.map((id) => model.boxById(id)).filter((inner) => inner !== undefined));
    }
  }

  // Open what hides the selection, on both sides; was there anything to open?
  private reveal(selected: NonNullable<Selection>): boolean {
    const was = this.open.size;
    for (const side of ["before", "after"] as const) {
      const { model } = this.side(side);
      const keys = "track" in selected
        ? this.tracks(selected.track, side).flatMap((t) => this.keysAround(model, model.byTrack.get(t)!))
        : parents(selected.key);
      for (const key of keys) if (key) this.open.add(key);
    }
    return this.open.size > was;
  }

  private keysAround(model: Model, node: number): string[] {
    const drawn = model.isDrawn(node) ? node : model.users[node].find((user) => model.isDrawn(user));
    return drawn === undefined ? [] : model.around(drawn).map((box) => box.key);
  }

  // What a node is on one side: itself, or what took its place, or what it took the place of.
  tracks(track: number, side: Side): number[] {
    const goal = side === "before" ? this.before : this.after;
    if (this.stage(goal).model.byTrack.has(track)) return [track];
    const lineage = this.lineage(track);
    return lineage[goal] ?? [];
  }

  // For each stage the nodes that were or became `track`.
  lineage(track: number): number[][] {
    const there = this.stages.map((_, i) => this.graphHas(i, track));
    const home = there.indexOf(true);
    if (home < 0) return [];
    const found: number[][] = this.stages.map(() => []);
    for (let i = 0; i < there.length; i++) if (there[i]) found[i] = [track];
    for (let i = home - 1; i >= 0; i--) found[i] = this.carry(found[i + 1], i + 1, i);
    for (let i = there.lastIndexOf(true) + 1; i < there.length; i++) found[i] = this.carry(found[i - 1], i, i);
    return found;
  }

  // Tracks across the pass that leads to stage `pass`, in the direction of `to`.
  private carry(tracks: number[], pass: number, to: number): number[] {
    const { replaced = [], changes = [] } = this.page.steps[this.stages[pass]];
    const forward = to === pass;
    const result = new Set<number>();
    for (const track of tracks) {
      if (this.graphHas(to, track)) {
        result.add(track);
        continue;
      }
      let others = replaced.filter(([old, now]) => track === (forward ? old : now)).map(([old, now]) => (forward ? now : old));
      if (!others.length) {
        // Nothing stands for it alone: what went and came together with it, if that is not too much.
        const change = changes.find((c) => (forward ? c.out : c.in).includes(track));
        others = (forward ? change?.in : change?.out) ?? [];
        if (others.length > 6) others = [];
      }
      for (const other of others) if (this.graphHas(to, other)) result.add(other);
    }
    return [...result];
  }

  private graphHas(stage: number, track: number): boolean { return this.stage(stage).model.byTrack.has(track); }

  status(track: number, side: Side): Status {
    if (!this.both || this.before === this.after) return "";
    const here = this.side(side).model;
    const there = this.side(side === "before" ? "after" : "before").model;
    const [a, b] = [here.byTrack.get(track), there.byTrack.get(track)];
    if (a === undefined) return "";
    if (b === undefined) return side === "before" ? "gone" : "new";
    const [x, y] = [here.graph.nodes[a], there.graph.nodes[b]];
    const same = x.k === y.k && x.s === y.s && (x.g ?? "") === (y.g ?? "") && home(here, a) === home(there, b);
    return same ? "" : "changed";
  }
}

// The loop that a node stands in; blocks may have other labels from pass to pass.
function home(model: Model, node: number): string {
  return model.around(node).find((box) => box.group?.kind === "loop")?.key ?? "";
}

function parents(key: string): string[] {
  const parts = key.split("/");
  return parts.slice(0, -1).map((_, i) => parts.slice(0, i + 1).join("/"));
}
