// The panel on the right: what is selected, or the passes where nothing is.

import type { App, Side } from "./app";
import { bytes, flops, rate, time, type NodeRecord, type StepRecord } from "./data";
import { shortList } from "./labels";
import type { Box, Model } from "./model";
import { button, h } from "./svg";

type Row = [name: string, value: Node | string | undefined];

export class Details {
  readonly root = h("aside", { class: "details", "aria-label": "details", tabindex: 0 });

  constructor(private readonly app: App) {}

  draw(): void {
    const { selected } = this.app;
    const found = !selected ? undefined : "key" in selected ? this.group(selected.key) : this.node(selected.track);
    this.root.replaceChildren(...(found ?? this.overview()));
  }

  // The side that holds the selection; the later one if both do.
  private home(track: number): { side: Side; model: Model; node: number } | undefined {
    for (const side of ["after", "before"] as const) {
      const { model } = this.app.side(side);
      const node = model.byTrack.get(track);
      if (node !== undefined) return { side, model, node };
    }
    return undefined;
  }

  private node(track: number): Node[] | undefined {
    const home = this.home(track);
    if (!home) return undefined;
    const { model, node, side } = home;
    const record = model.graph.nodes[node];
    const status = this.app.status(track, side);
    const [place, source] = record.l ? this.app.page.lines[record.l - 1] : ["", ""];
    const results = record.o.slice(0, 24).map(([name, type, size]) =>
      h("div", {}, h("code", {}, name), " ", h("code", { class: "type" }, type), h("small", {}, ` ${bytes(size)}`)),
    );
    const profiled = this.app.page.profile?.rows.find(([t]) => t === track);
    const loop = model.loopGroup.get(node);
    const rows: Row[] = [
      ["kernel", record.k], ["stream", record.s],
      ["runs", record.g === "pack" ? "once, when the program is made" : record.g === "prepare" ? "once for each set of parameters" : undefined],
      ["settings", record.a && Object.keys(record.a).length ? this.settings(record.a) : undefined],
      ["moves", record.b === undefined ? undefined : `at least ${bytes(record.b)}`],
      ["computes", record.f === undefined ? undefined : flops(record.f)],
      ["measured", profiled && `${time(profiled[1])} in ${profiled[2]} ${profiled[2] === 1 ? "run" : "runs"}, ${this.percent(track)} of all nodes`],
      ["moved at", profiled && profiled[3] > 0 ? `${rate(profiled[3] / profiled[1])}; a copy ${rate(this.app.page.profile!.bandwidth)}` : undefined],
      ["estimate", profiled ? time(profiled[4]) : this.app.shares.has(track) ? `${this.percent(track)} of the time` : undefined],
      ["made by", record.m],
    ];
    const stateWord = { gone: "a later pass took it away", new: "made by the passes shown", changed: "carried out otherwise", "": "" }[status];
    return [
      h("h2", { class: status }, record.op),
      ...(stateWord ? [h("p", { class: `state ${status}` }, stateWord)] : []),
      ...(record.c ? [h("pre", { class: "call" }, record.c)] : []),
      ...(loop === undefined ? [] : [this.foldButton(model.boxes[loop])]),
      h("h3", {}, record.o.length > 1 ? `${record.o.length} results` : "Result"), h("div", { class: "values" }, ...results),
      ...(record.o.length > 24 ? [h("p", { class: "dim" }, `and ${record.o.length - 24} more`)] : []),
      ...(place ? [h("h3", {}, "Written in"), h("p", { class: "origin" }, h("b", {}, place), ...(source ? [h("pre", {}, source)] : []))] : []),
      ...this.table(rows),
      ...this.values("Reads", model, record.i.map(([n]) => model.source(n))),
      ...this.values("Read by", model, model.users[node]),
      ...this.history(track, record),
    ];
  }

  private percent(track: number): string {
    const share = 100 * (this.app.shares.get(track) ?? 0);
    return share < 0.05 ? "less than 0.1%" : `${share.toFixed(1)}%`;
  }

  private settings(entries: Record<string, string>): Node {
    const list = Object.entries(entries).map(([name, value]) => h("div", {}, h("code", {}, `${name} = ${value}`)));
    return h("div", {}, ...list);
  }

  private table(rows: Row[]): Node[] {
    const there = rows.filter(([, value]) => value !== undefined && value !== "");
    if (!there.length) return [];
    return [h("dl", {}, ...there.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value as Node | string)]))];
  }

  private values(title: string, model: Model, nodes: number[]): Node[] {
    const unique = [...new Set(nodes)];
    if (!unique.length) return [];
    const shown = unique.slice(0, 12).map((n) => this.reference(model, n));
    const more = unique.length > 12 ? [h("p", { class: "dim" }, `and ${unique.length - 12} more`)] : [];
    return [h("h3", {}, title), h("div", { class: "values" }, ...shown), ...more];
  }

  private reference(model: Model, node: number): Node {
    const record = model.graph.nodes[node];
    const [name, type] = record.o[0] ?? ["", ""];
    const what = record.op === "constant" || record.op === "input" ? "" : ` ${record.op}`;
    const link = button("", () => this.app.select({ track: record.t }), { class: "link" });
    link.append(h("code", {}, name), what, " ", h("code", { class: "type" }, type));
    return h("div", {}, link);
  }

  // What each pass did to the node, to what it came from and to what came of it.
  private history(track: number, record: NodeRecord): Node[] {
    const { app } = this;
    const lineage = app.lineage(track);
    const entries = app.stages.flatMap((place, i) => {
      const step = app.page.steps[place];
      const { model } = app.stage(i);
      const texts = (at: number, tracks: number[]) => tracks.map((t) => {
        const { graph, byTrack } = app.stage(at).model;
        const node = graph.nodes[byTrack.get(t)!];
        return node.c ? `${node.o[0]?.[0]} = ${node.c}` : node.o[0]?.[0] ?? "";
      });
      if (i === 0) return lineage[0]?.length ? [this.entry(i, step, "written", texts(0, lineage[0]), [])] : [];
      const [was, now] = [lineage[i - 1] ?? [], lineage[i] ?? []];
      const known = new Set([...was, ...now]);
      const touched = (step.changes ?? []).filter((c) => [c.out, c.in, c.moved, c.altered].some((list) => list.some((t) => known.has(t))));
      const refused = (step.refused ?? []).filter(([line, op]) => now.some((t) => {
        const node = model.graph.nodes[model.byTrack.get(t)!];
        return node.l === line + 1 && node.op === op;
      })).map(([, , reason]) => `left alone: ${reason}`);
      if (!touched.length && !refused.length) return [];
      const gone = was.some((t) => !model.byTrack.has(t));
      const came = now.some((t) => !app.stage(i - 1).model.byTrack.has(t));
      const moved = touched.some((c) => c.moved.some((t) => known.has(t)));
      const what = gone && now.length ? "replaced by" : gone ? "removed" : came ? "made" : moved ? "moved" : touched.length ? "changed" : "";
      return [this.entry(i, step, what, what === "removed" ? texts(i - 1, was) : texts(i, now), [...new Set([...touched.flatMap((c) => c.why), ...refused])])];
    });
    if (app.stages.length < 2 || record.op === "input") return [];
    return [h("h3", {}, "History"), h("ol", { class: "history" }, ...entries)];
  }

  private entry(stage: number, step: StepRecord, what: string, texts: string[], why: string[]): Node {
    const link = button(step.name, () => this.app.compare(stage - 1, stage), { class: "link pass" });
    const shown = stage === this.app.after ? "now" : "";
    return h(
      "li", { class: shown }, link, what && h("span", { class: "dim" }, ` ${what}`),
      ...texts.slice(0, 4).map((text) => h("pre", {}, text)),
      ...(texts.length > 4 ? [h("p", { class: "dim" }, `and ${texts.length - 4} more`)] : []),
      ...why.map((reason) => h("p", { class: "why" }, reason)),
    );
  }

  private foldButton(box: Box): Node {
    const open = this.app.open.has(box.key);
    return h("p", {}, button(open ? "Fold" : "Unfold", () => this.app.toggle(box.key), { class: "button" }));
  }

  private group(key: string): Node[] | undefined {
    for (const side of ["after", "before"] as const) {
      const { model } = this.app.side(side);
      const box = model.boxByKey(key);
      if (!box?.group) continue;
      if (box.group.node !== undefined) return this.node(model.graph.nodes[box.group.node].t);
      const records = box.tracks.map((t) => model.graph.nodes[model.byTrack.get(t)!]).filter((r) => r.op !== "input");
      const ops = new Map<string, number>();
      for (const { op } of records) ops.set(op, (ops.get(op) ?? 0) + 1);
      const sum = (pick: (r: NodeRecord) => number | undefined) => records.reduce((a, r) => a + (pick(r) ?? 0), 0);
      const share = box.tracks.reduce((a, t) => a + (this.app.shares.get(t) ?? 0), 0);
      const streams = [...new Set(records.map((r) => r.s).filter(Boolean))] as string[];
      const kernels = [...new Set(records.map((r) => r.k).filter(Boolean))] as string[];
      const kinds = { stage: "Runs before the calls", loop: "A loop", body: "A body", block: "A repeated block", part: "A part of a long graph" };
      return [
        h("h2", {}, box.group.label), h("p", { class: "dim" }, `${kinds[box.group.kind]}: ${box.count} operations`),
        this.foldButton(box),
        ...this.table([
          ["moves", `at least ${bytes(sum((r) => r.b))}`], ["computes", flops(sum((r) => r.f))],
          ["time", share > 0 ? `${(100 * share).toFixed(1)}% ${this.app.page.profile ? "measured" : "estimated"}` : undefined],
          ["streams", streams.join(", ")], ["kernels", kernels.join(", ")],
          ["takes", shortList([...box.ports.values()].map((p) => p.node.o[p.output][0]), 6)],
        ]),
        h("h3", {}, "Operations"),
        h("table", { class: "ops" }, ...[...ops].sort((a, b) => b[1] - a[1]).map(([op, n]) => h("tr", {}, h("td", {}, op), h("td", {}, String(n))))),
      ];
    }
    return undefined;
  }

  private overview(): Node[] {
    const { page, stages } = this.app;
    const profile = page.profile;
    const rows = stages.map((place, stage) => {
      const step = page.steps[place];
      const name = stage > 0 ? button(step.name, () => this.app.compare(stage - 1, stage), { class: "link pass" }) : step.name;
      const words = step.summary ?? `${this.app.stage(stage).model.top.count} operations`;
      return h("tr", {}, h("td", {}, name), h("td", {}, words));
    });
    const idle = page.steps.filter((step) => !step.graph).map((step) => step.name);
    return [
      h("h2", {}, page.name), h("p", { class: "dim" }, page.target),
      ...(profile ? [h("p", {}, `A call takes ${time(profile.seconds)}, its nodes one by one ${time(profile.total)}; a copy moves ${rate(profile.bandwidth)}.`)] : []),
      ...(page.steps.length > 1
        ? [h("h3", {}, "Passes"), h("table", { class: "passes" }, h("tr", {}, h("th", {}, "pass"), h("th", {}, "what changed")), ...rows)]
        : []),
      ...(idle.length ? [h("details", {}, h("summary", {}, `${idle.length} passes changed nothing`), h("p", { class: "dim" }, idle.join(", ")))] : []),
      h("p", { class: "dim" }, "Click a node for what it is; double-click a group to unfold it; ? for keys."),
    ];
  }
}
