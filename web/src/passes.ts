// The strip of passes: a click shows what one did, the first chip what all did together.

import type { App } from "./app";
import { button, h } from "./svg";

export class Passes {
  readonly root = h("nav", { class: "passes-strip", "aria-label": "passes" });

  constructor(private readonly app: App) {}

  draw(): void {
    const { page, stages, before, after } = this.app;
    const last = stages.length - 1;
    const chip = (text: string, from: number, to: number, title: string) =>
      button(text, () => this.app.compare(from, to), {
        class: before === from && after === to ? "chip here" : "chip", title,
        "aria-pressed": String(before === from && after === to),
      });
    const chips = stages.slice(1).map((place, i) => {
      const step = page.steps[place];
      return chip(step.name, i, i + 1, step.summary ?? "");
    });
    const all = last > 1 ? [chip("all passes", 0, last, "as written, and the plan"), h("span", { class: "arrow" }, "→")] : [];
    this.root.replaceChildren(...all, ...chips);
    this.root.querySelector(".here")?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  step(by: number): void {
    const last = this.app.stages.length - 1;
    const whole = this.app.after - this.app.before !== 1;
    const to = whole ? (by > 0 ? 1 : last) : this.app.after + by;
    if (to < 1 || to > last) this.app.compare(0, last);
    else this.app.compare(to - 1, to);
  }
}
