// Puts the page together.

import { App, type Colours } from "./app";
import { read } from "./data";
import { Details } from "./details";
import { helpDialog, listen } from "./keys";
import { Pane } from "./pane";
import { Passes } from "./passes";
import { Search } from "./search";
import { button, h } from "./svg";
import { TimelinePanel } from "./timeline";

function theme(): void {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

async function start(): Promise<void> {
  const page = await read(document.getElementById("data")!.textContent!);
  const app = new App(page);
  const panes = [new Pane(app, "before"), new Pane(app, "after")];
  const details = new Details(app);
  const search = new Search(app);
  const passes = new Passes(app);
  const timeline = new TimelinePanel(app, () => toggleTimeline());
  const help = helpDialog();
  const many = app.stages.length > 1;

  const toggleTimeline = (): void => {
    document.body.classList.toggle("with-timeline");
    timelineButton.setAttribute("aria-pressed", String(document.body.classList.contains("with-timeline")));
    timeline.draw();
  };
  const timelineButton = button("Timeline", toggleTimeline, { title: "l", "aria-pressed": "false", class: "tool" });
  const bothButton = button("Side by side", () => app.set({ both: !app.both }), { title: "b", class: "tool" });
  const time = page.profile ? "time, measured" : "time, estimated";
  const names: [Colours, string][] = [...(many ? [["changes", "changes"] as [Colours, string]] : []), ["streams", "streams"], ["time", time]];
  const colours = h("select", { "aria-label": "colour by" }, ...names.map(([value, text]) => h("option", { value }, text)));
  colours.addEventListener("change", () => app.set({ colours: colours.value as Colours }));
  if (!many && app.colours === "changes") app.colours = "streams";
  colours.value = app.colours;

  const tools = h(
    "div", { class: "tools" }, h("label", { class: "dim" }, "Colour: ", colours),
    ...(many ? [bothButton] : []), timelineButton,
    button("Fold", () => app.fold(true), { title: "c: fold everything", class: "tool" }),
    button("Unfold", () => app.fold(false), { title: "e: unfold everything", class: "tool" }),
    button("◐", theme, { title: "t: light or dark", "aria-label": "light or dark", class: "tool" }),
    button("?", () => help.showModal(), { title: "keys", "aria-label": "keys", class: "tool" }),
  );
  const brand = h("div", { class: "brand" }, h("b", {}, page.name), h("span", { class: "dim" }, page.target));
  const graphs = h("main", {}, ...panes.map((pane) => pane.root));
  document.body.append(
    h("header", { class: "bar-top" }, brand, search.root, tools),
    ...(many ? [passes.root] : []),
    h("div", { class: "middle" }, graphs, details.root), timeline.root, help,
  );

  const shown = (): Pane[] => panes.filter((pane) => pane.side === "after" || app.both);
  const draw = (): void => {
    document.body.classList.toggle("one", !app.both);
    document.body.dataset.colours = app.colours;
    bothButton.setAttribute("aria-pressed", String(app.both));
    for (const pane of shown()) pane.draw();
    app.fresh = false;
    passes.draw();
  };
  app.onChange((what) => {
    if (what === "view") draw();
    else for (const pane of shown()) pane.mark();
    details.draw();
    for (const pane of shown()) if (app.selected) pane.show();
    if (document.body.classList.contains("with-timeline")) timeline.draw();
  });
  listen(app, {
    panes: shown, search: () => search.input.focus(), timeline: toggleTimeline, theme, step: (by) => passes.step(by),
  }, help);
  addEventListener("resize", () => document.body.classList.contains("with-timeline") && timeline.draw());
  draw();
  details.draw();
  if (location.hash === "#timeline") toggleTimeline();
  document.documentElement.dataset.ready = `${Math.round(performance.now())}`;
}

start().catch((error: unknown) => {
  document.body.append(h("p", { class: "failed" }, `The page could not be shown: ${String(error)}`));
  throw error;
});
