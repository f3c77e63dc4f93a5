// One graph of the plan as a tree of groups, with the edges between what stands side by side.

import type { GraphRecord, GroupRecord, NodeRecord } from "./data";

export interface Edge { from: string; to: string; values: Set<string> }

export interface Port { id: string; node: NodeRecord; output: number }

// What a group holds: ids are "n12" for a node, "g3" for a group, "p4.0" for a value from outside
// and "y" for what it gives back.
export interface Box {
  id: string;
  index: number; // of the group, -1 at the top
  key: string; // the same for the same group in every step
  group?: GroupRecord;
  items: string[];
  ports: Map<string, Port>;
  edges: Map<string, Edge>;
  inputs: string[]; // names of inputs drawn as one, which is item "i"
  yields: string[]; // names of what a body gives back
  yieldsShown: boolean;
  count: number; // operations inside, at any depth
  tracks: number[];
}

export class Model {
  readonly boxes: Box[]; // by group; the last is the top
  readonly byTrack = new Map<number, number>();
  readonly users: number[][];
  private readonly hidden: boolean[];
  private readonly chains = new Map<number, Box[]>();
  readonly loopGroup = new Map<number, number>(); // group of a loop's node

  constructor(readonly graph: GraphRecord) {
    const { nodes, groups } = graph;
    nodes.forEach((node, i) => this.byTrack.set(node.t, i));
    this.users = nodes.map(() => []);
    groups.forEach((g, i) => g.kind === "loop" && this.loopGroup.set(g.node!, i));
    this.boxes = [...groups, undefined].map((group, i) => ({
      id: group ? `g${i}` : "top",
      index: group ? i : -1,
      key: "",
      group,
      items: [],
      ports: new Map(),
      edges: new Map(),
      inputs: [],
      yields: (group ? group.yields : graph.outputs)?.map(([n, o]) => nodes[n].o[o][0]) ?? [],
      yieldsShown: !group || group.yields !== undefined,
      count: 0,
      tracks: [],
    }));
    for (const box of this.boxes) box.key = this.keyOf(box);
    this.hidden = nodes.map((node) => node.op === "constant" || node.v === 1);
    this.fill();
  }

  get top(): Box { return this.boxes[this.boxes.length - 1]; }

  box(group: number): Box { return group < 0 ? this.top : this.boxes[group]; }

  boxById(id: string): Box | undefined {
    return id === "top" ? this.top : id[0] === "g" ? this.boxes[Number(id.slice(1))] : undefined;
  }

  boxByKey(key: string): Box | undefined { return this.boxes.find((box) => box.key === key); }

  // The id of the item that stands for a node, in the box that holds it.
  item(node: number): string {
    const loop = this.loopGroup.get(node);
    return loop === undefined ? `n${node}` : `g${loop}`;
  }

  isDrawn(node: number): boolean { return !this.hidden[node]; }

  // Boxes around a node, innermost first, the top last.
  around(node: number): Box[] {
    const group = this.graph.nodes[node].p;
    if (!this.chains.has(group)) {
      const found: Box[] = [];
      for (let g = group; g >= 0; g = this.graph.groups[g].parent) found.push(this.boxes[g]);
      this.chains.set(group, [...found, this.top]);
    }
    return this.chains.get(group)!;
  }

  // Where a value really comes from: inputs of bodies that stand for outer values lead there.
  source(node: number): number {
    let at = node;
    while (this.graph.nodes[at].v === 1) at = this.graph.nodes[at].i[0][0];
    return at;
  }

  // Constants, and what is packed from them: named beside a node and not drawn as an edge.
  isWeight(node: number): boolean {
    const record = this.graph.nodes[this.source(node)];
    return record.op === "constant" || (record.g ?? "") !== "";
  }

  isNumber(node: number): boolean {
    const record = this.graph.nodes[node];
    return record.op === "constant" && !record.o[0][0].startsWith("@");
  }

  weights(node: NodeRecord): string[] {
    const found = node.i.filter(([n]) => this.isWeight(n) && !this.isNumber(n));
    return found.map(([n, o]) => this.graph.nodes[n].o[o][0].replace(/^@/, ""));
  }

  private keyOf(box: Box): string {
    if (!box.group) return "";
    const { parent, kind, label, node } = box.group;
    const above = this.box(parent);
    const own = kind === "loop" ? `loop${this.graph.nodes[node!].t}` : `${kind} ${label}`;
    return `${above.key}/${own}`;
  }

  private fill(): void {
    const { nodes, groups, outputs } = this.graph;
    const placed = new Set<number>();
    const place = (group: number): void => {
      // A group joins its parent where its first node stands, so that the order is the program's.
      if (group < 0 || placed.has(group)) return;
      placed.add(group);
      place(groups[group].parent);
      this.box(groups[group].parent).items.push(`g${group}`);
    };
    nodes.forEach((node, i) => {
      for (const [source] of node.i) this.users[this.source(source)].push(i);
      if (this.hidden[i]) return;
      place(node.p);
      const loop = this.loopGroup.get(i);
      if (loop !== undefined) place(loop);
      else this.box(node.p).items.push(`n${i}`);
      for (const box of this.around(i)) {
        if (node.op !== "input") box.count += 1;
        box.tracks.push(node.t);
      }
    });
    nodes.forEach((node, i) => {
      if (this.hidden[i] || (node.op === "input" && node.i.length)) return;
      for (const [source, output] of node.i) this.connect(this.source(source), output, i);
    });
    const give = (box: Box, values: [number, number][]): void => {
      for (const [n, o] of values) {
        const source = this.source(n);
        const id = this.within(box, source);
        if (id !== undefined && this.isDrawn(source)) join(box, id, "y", `${source}.${o}`);
      }
    };
    for (const box of this.boxes) {
      if (box.yieldsShown) give(box, box.group?.yields ?? outputs);
      this.thin(box);
    }
  }

  // Leave out what would hide the graph behind its lines: inputs that only inner groups read become
  // one, values that many read get no lines (selecting shows them), nor what is given back on the way.
  private thin(box: Box): void {
    const inputs = box.items.filter((id) => id[0] === "n" && this.graph.nodes[Number(id.slice(1))].op === "input");
    let edges = [...box.edges.values()];
    if (inputs.length > 6) {
      const direct = new Set(edges.filter((e) => e.to[0] === "n").map((e) => e.from));
      const rest = new Set(inputs.filter((id) => !direct.has(id)));
      if (rest.size > 2) {
        box.inputs = [...rest].map((id) => this.graph.nodes[Number(id.slice(1))].o[0][0]);
        box.items = ["i", ...box.items.filter((id) => !rest.has(id))];
        edges = edges.map((e) => (rest.has(e.from) ? { ...e, from: "i" } : e));
      }
    }
    const readers = new Map<string, number>();
    for (const edge of edges) for (const value of edge.values) readers.set(value, (readers.get(value) ?? 0) + 1);
    const given = edges.filter((e) => e.to === "y").length;
    const isEnd = (id: string) => edges.every((e) => e.from !== id || e.to === "y");
    const together = new Set(edges.filter((e) => e.from === "i").map((e) => e.to)).size;
    const kept = edges.filter(({ from, to, values }) =>
      from === "i" ? together <= 4 :
      to === "y" ? given <= 4 || isEnd(from) : [...values].some((value) => readers.get(value)! <= 6));
    box.edges = new Map(kept.map((e) => [`${e.from}>${e.to}`, e]));
    // Ports to everything would be no help either.
    for (const id of box.ports.keys()) if (!kept.some((e) => e.from === id)) box.ports.delete(id);
  }

  // What a node shows as within `box`, or undefined where it stands outside.
  private within(box: Box, node: number): string | undefined {
    let id = this.item(node);
    for (const each of this.around(node)) {
      if (each === box) return id;
      id = each.id;
    }
    return undefined;
  }

  private connect(source: number, output: number, reader: number): void {
    const outer = this.graph.nodes[source].op === "constant" || this.isWeight(source);
    if (outer && (this.graph.nodes[reader].g ?? "") === "") return;
    if (!this.isDrawn(source)) return;
    let to = this.item(reader);
    for (const box of this.around(reader)) {
      const from = this.within(box, source);
      if (from !== undefined) {
        if (from !== to) join(box, from, to, `${source}.${output}`);
        return;
      }
      const id = `p${source}.${output}`;
      box.ports.set(id, { id, node: this.graph.nodes[source], output });
      join(box, id, to, id);
      to = box.id;
    }
  }
}

function join(box: Box, from: string, to: string, value: string): void {
  const key = `${from}>${to}`;
  const edge = box.edges.get(key) ?? { from, to, values: new Set<string>() };
  box.edges.set(key, edge);
  edge.values.add(value);
}
