// What keys do.

import type { App } from "./app";
import type { Pane } from "./pane";
import { h } from "./svg";

export interface Actions {
  panes(): Pane[];
  search(): void;
  timeline(): void;
  theme(): void;
  step(by: number): void;
}

const HELP: [string, string][] = [
  ["/", "search; Enter goes to the next match"],
  ["↑ ↓", "to what a node reads, to what reads it"],
  ["← →", "to the node before or after in the program"],
  ["Enter or Space", "fold or unfold the group, or the one around the node"],
  ["e, c", "unfold everything, fold everything"],
  ["[ ]", "the pass before, the pass after; 0 all passes"],
  ["b", "both graphs, or only the one after"],
  ["f", "fit into the window; + and - zoom"],
  ["l", "timeline of the streams"],
  ["t", "light or dark"],
  ["Esc", "select nothing"],
];

export function helpDialog(): HTMLDialogElement {
  const rows = HELP.map(([key, what]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, what)));
  const dialog = h("dialog", { class: "help" }, h("h2", {}, "Keys"), h("table", {}, ...rows));
  dialog.addEventListener("click", () => dialog.close());
  return dialog;
}

export function listen(app: App, actions: Actions, help: HTMLDialogElement): void {
  const last = () => app.stages.length - 1;
  const keys: Record<string, () => void> = {
    "/": () => actions.search(),
    ArrowUp: () => follow(app, "reads"),
    ArrowDown: () => follow(app, "read"),
    ArrowLeft: () => along(app, -1),
    ArrowRight: () => along(app, 1),
    Enter: () => fold(app),
    " ": () => fold(app),
    e: () => app.fold(false),
    c: () => app.fold(true),
    "[": () => actions.step(-1),
    "]": () => actions.step(1),
    "0": () => app.compare(0, last()),
    b: () => last() > 0 && app.set({ both: !app.both }),
    f: () => actions.panes().forEach((pane) => pane.fit()),
    "+": () => actions.panes().forEach((pane) => pane.zoomBy(1.3)),
    "=": () => actions.panes().forEach((pane) => pane.zoomBy(1.3)),
    "-": () => actions.panes().forEach((pane) => pane.zoomBy(1 / 1.3)),
    l: () => actions.timeline(),
    t: () => actions.theme(),
    Escape: () => app.select(undefined),
    "?": () => help.showModal(),
  };
  document.addEventListener("keydown", (event) => {
    const target = event.target as HTMLElement;
    if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, select, dialog")) return;
    if ((event.key === "Enter" || event.key === " ") && target.closest("button")) return;
    const action = keys[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
}

function current(app: App): { model: ReturnType<App["side"]>["model"]; node: number } | undefined {
  const { selected } = app;
  if (!selected || !("track" in selected)) return undefined;
  for (const side of ["after", "before"] as const) {
    const { model } = app.side(side);
    const node = model.byTrack.get(selected.track);
    if (node !== undefined) return { model, node };
  }
  return undefined;
}

function follow(app: App, way: "reads" | "read"): void {
  const here = current(app);
  if (!here) return along(app, 1);
  const { model, node } = here;
  const next = way === "reads" ? model.graph.nodes[node].i.map(([n]) => model.source(n)) : model.users[node];
  const goal = next.find((n) => model.isDrawn(n) && !model.isWeight(n)) ?? next.find((n) => model.isDrawn(n));
  if (goal !== undefined) app.select({ track: model.graph.nodes[goal].t });
}

function along(app: App, by: number): void {
  const { model } = current(app) ?? app.side("after");
  const { nodes } = model.graph;
  let at = current(app)?.node ?? -1;
  do at += by; while (at >= 0 && at < nodes.length && (!model.isDrawn(at) || nodes[at].op === "input"));
  if (at >= 0 && at < nodes.length) app.select({ track: nodes[at].t });
}

function fold(app: App): void {
  if (app.selected && "key" in app.selected) return app.toggle(app.selected.key);
  const here = current(app);
  if (!here) return;
  const loop = here.model.loopGroup.get(here.node);
  const box = loop === undefined ? here.model.around(here.node)[0] : here.model.boxes[loop];
  if (!box.group) return;
  app.toggle(box.key);
  if (loop === undefined) app.select({ key: box.key }, false);
}
