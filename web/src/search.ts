// Finds nodes by op, name, type, weight, line, kernel or settings; all words must be there.

import type { App } from "./app";
import type { Model } from "./model";
import { h } from "./svg";

const MOST = 40;

export class Search {
  readonly root: HTMLElement;
  readonly input = h("input", {
    type: "search", placeholder: "Search: op, name, type, line, kernel", "aria-label": "search nodes", spellcheck: "false",
  });
  private readonly list = h("div", { class: "found", role: "listbox" });
  private readonly texts = new WeakMap<Model, string[]>();
  private found: { track: number; rank: number; label: (Node | string)[] }[] = [];
  private at = -1;

  constructor(private readonly app: App) {
    this.root = h("div", { class: "search" }, this.input, this.list);
    this.input.addEventListener("input", () => this.run());
    this.input.addEventListener("keydown", (event) => this.key(event));
    this.input.addEventListener("blur", () => setTimeout(() => this.list.classList.remove("open"), 150));
    this.input.addEventListener("focus", () => this.input.value && this.run());
  }

  private text(model: Model): string[] {
    let texts = this.texts.get(model);
    if (!texts) {
      texts = model.graph.nodes.map((node) => {
        const place = node.l ? this.app.page.lines[node.l - 1].join(" ") : "";
        const settings = Object.entries(node.a ?? {}).map(([k, v]) => `${k}=${v}`).join(" ");
        const names = node.o.map(([name, type]) => `${name} ${type}`).join(" ");
        return `${node.op} ${names} ${model.weights(node).join(" ")} ${place} ${node.k ?? ""} ${settings} ${node.m ?? ""}`.toLowerCase();
      });
      this.texts.set(model, texts);
    }
    return texts;
  }

  private run(): void {
    const words = this.input.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.found = [];
    this.at = -1;
    const seen = new Set<number>();
    for (const side of words.length ? (["after", "before"] as const) : []) {
      const { model } = this.app.side(side);
      this.text(model).forEach((text, i) => {
        const node = model.graph.nodes[i];
        if (node.v || seen.has(node.t) || !words.every((word) => text.includes(word))) return;
        seen.add(node.t);
        const [name, type] = node.o[0] ?? ["", ""];
        const place = node.l ? this.app.page.lines[node.l - 1][0] : "";
        const weight = model.weights(node)[0] ?? "";
        const gone = side === "before" && this.app.both ? "only before" : "";
        this.found.push({
          track: node.t,
          // Ops and names come before what only stands on the same line of the source.
          rank: words.some((word) => node.op === word || name === word) ? 0 : words.some((word) => node.op.includes(word)) ? 1 : 2,
          label: [h("b", {}, node.op), " ", h("code", {}, `${name} ${type}`), h("small", {}, [weight, place, gone].filter(Boolean).join(" · "))],
        });
      });
    }
    this.found.sort((a, b) => a.rank - b.rank);
    this.show(words.length > 0);
  }

  private show(asked: boolean): void {
    const rows = this.found.slice(0, MOST).map(({ label }, i) => {
      const row = h("div", { class: "hit", role: "option" }, ...label);
      row.addEventListener("mousedown", () => this.go(i));
      return row;
    });
    const count = this.found.length;
    const words = count === 0 ? "nothing found" : count > MOST ? `the first ${MOST} of ${count}` : `${count} found`;
    this.list.replaceChildren(...rows, h("div", { class: "count" }, words));
    this.list.classList.toggle("open", asked);
  }

  private go(index: number): void {
    if (!this.found.length) return;
    this.at = (index + this.found.length) % this.found.length;
    [...this.list.children].forEach((row, i) => row.classList.toggle("here", i === this.at));
    this.list.children[this.at]?.scrollIntoView({ block: "nearest" });
    this.app.select({ track: this.found[this.at].track });
  }

  private key(event: KeyboardEvent): void {
    event.stopPropagation();
    if (event.key === "ArrowDown" || (event.key === "Enter" && !event.shiftKey)) this.go(this.at + 1);
    else if (event.key === "ArrowUp" || event.key === "Enter") this.go(this.at - 1);
    else if (event.key === "Escape") this.input.blur();
    else return;
    event.preventDefault();
  }
}
