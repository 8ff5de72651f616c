/** The token explorer: controls, the shaded text, the table of tokens, and one token's numbers in every SAE. */

import type { Explored } from "./data.ts";
import { choice, element, field, later } from "./dom.ts";
import { glance, linearity } from "./glance.ts";
import { EVERY, LEAST, Values, matching, ordered, placeKeys, quantities, shadingEnds } from "./select.ts";
import type { Quantity } from "./select.ts";
import { snippet, whereabouts } from "./snippet.ts";
import { Tabulator, buttonCell, textCell } from "./tables.ts";
import type { CellComponent, ColumnDefinition, Options } from "./tables.ts";
import { inline, percent, shownNumber, visible } from "./text.ts";

const CONTEXTS_SHOWN = 8; // of the text at a time: some 1000 tokens
const ROWS_SHOWN = 20;

/** What Tabulator asks for. */
interface Wanted {
  page?: number;
  sort?: { field: string; dir: string }[];
}

export class TokenExplorer {
  private readonly values: Values;
  private readonly quantities: Quantity[];
  private quantity: Quantity;
  private sae: number;
  private found: Int32Array = new Int32Array();
  private readonly endsOf = new Map<Float32Array, [number, number]>();
  private page = 0;
  private chosen = -1;
  private table?: Tabulator;
  private readonly text = element("div", {
    class: "text",
    role: "listbox",
    "aria-label": "Tokens of the text",
  });
  private readonly details = element("section", { class: "details", "aria-label": "The token" });
  private readonly status = element("p", { class: "unseen", role: "status" }); // of the focused token, read aloud
  private readonly count = element("output", {});
  private readonly legend = element("p", { class: "legend" });
  private readonly pages = element("p", { class: "pages" });
  private readonly inputs: Record<string, HTMLInputElement> = {};

  constructor(
    root: HTMLElement,
    private readonly data: Explored,
    private readonly openLatent: (sae: number, latent: number) => void,
  ) {
    this.values = new Values(data);
    this.quantities = quantities(data);
    this.quantity = this.quantities[0];
    this.sae = this.firstSae;
    const tableRoot = element("div", { class: "token-table" });
    const left = element(
      "div",
      {},
      element("h4", {}, "Every token, by value"),
      this.count,
      tableRoot,
      element("h4", {}, "The text, shaded by this value"),
      this.legend,
      this.pages,
      this.text,
    );
    root.replaceChildren(
      glance(data, this.values, (place) => this.choose(place, true), openLatent),
      this.controls(),
      element("p", { class: "small" }, this.aboutKl()),
      element("div", { class: "beside" }, left, this.details),
      this.status,
    );
    this.listen();
    this.buildTable(tableRoot);
    this.select();
    if (this.ranked().length > 0) this.choose(this.ranked()[0], false);
  }

  // ---- controls

  /** What is large for every SAE comes first. */
  private get firstSae(): number {
    return this.data.saes.length > 1 ? LEAST : 0;
  }

  private aboutKl(): string {
    const { contexts, absent } = this.data.kl;
    if (absent !== undefined) return `No KL here: ${inline(absent)}.`;
    return (
      "KL: how far the model's next-token distribution moves when Sae(x) takes the place of x at every measured token " +
      `of a context at once, as in the experiment downstream; computed in ${contexts} of the ` +
      `${this.data.contexts.length} contexts here.`
    );
  }

  private controls(): HTMLElement {
    const [byLabel, by] = choice(
      "Shade and sort by",
      this.quantities.map(({ key, label }) => [key, label]),
    );
    const several: [string, string][] = [
      [String(LEAST), "every SAE (least)"],
      [String(EVERY), "every SAE (mean)"],
    ];
    const [saeLabel, sae] = choice("of", [
      ...(this.data.saes.length > 1 ? several : []),
      ...this.data.saes.map(({ name }, i): [string, string] => [String(i), visible(name)]),
    ]);
    by.addEventListener("change", () => {
      this.quantity = this.quantities.find(({ key }) => key === by.value)!;
      this.changed();
    });
    sae.addEventListener("change", () => {
      this.sae = Number(sae.value);
      this.changed();
    });
    const refilter = later(() => {
      this.select();
      void this.table?.setPage(1);
    });
    const fields: [string, string, Record<string, string>][] = [
      ["token", "Token contains", { type: "search", size: "10" }],
      ["context", "Context contains", { type: "search", size: "14" }],
      ["minCount", "Occurs at least", { type: "number", min: "1", placeholder: "1" }],
      ["maxCount", "at most", { type: "number", min: "1", placeholder: "any" }],
      ["minPosition", "Position from", { type: "number", min: "0", placeholder: "0" }],
      ["maxPosition", "to", { type: "number", min: "0", placeholder: "any" }],
    ];
    const labels = fields.map(([key, label, attributes]) => {
      const [own, input] = field(label, attributes);
      this.inputs[key] = input;
      input.addEventListener("input", refilter);
      return own;
    });
    const reset = element("button", { type: "reset" }, "Reset");
    const form = element(
      "form",
      { class: "controls", "aria-label": "Tokens shown" },
      byLabel,
      saeLabel,
      ...labels,
      reset,
    );
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => {
      this.quantity = this.quantities[0];
      this.sae = this.firstSae;
      setTimeout(() => this.changed());
    });
    return form;
  }

  private number(key: string, otherwise: number): number {
    const { value } = this.inputs[key];
    return value === "" ? otherwise : Number(value);
  }

  private select(): void {
    this.found = matching(this.data, this.shading, {
      token: this.inputs.token.value,
      context: this.inputs.context.value,
      minCount: this.number("minCount", 0),
      maxCount: this.number("maxCount", Infinity),
      minPosition: this.number("minPosition", 0),
      maxPosition: this.number("maxPosition", Infinity),
    });
    const all = this.data.tokens.length;
    this.count.textContent =
      `${this.found.length} tokens of ${all} in the text here (${this.data.heldOut} were held out). ` +
      `Tokens without a value were left out of the measurement${this.isOfSome ? ", or stand in contexts where it was not computed" : ""}.`;
    this.page = 0;
    this.showText();
  }

  private changed(): void {
    this.select();
    this.table?.setColumns(this.columns());
    void this.table?.setSort([{ column: "value", dir: "desc" }]);
    if (this.chosen >= 0) this.describe(this.chosen);
  }

  /** Whether the value was computed in some contexts only. */
  private get isOfSome(): boolean {
    return ["kl", "loss"].includes(this.quantity.key);
  }

  private get shading(): Float32Array {
    return this.values.of(this.quantity.key, this.quantity.ofSae ? this.sae : 0);
  }

  private ends(): [number, number] {
    let found = this.endsOf.get(this.shading);
    if (found === undefined) this.endsOf.set(this.shading, (found = shadingEnds(this.shading)));
    return found;
  }

  private ranked(column = "value", direction = "desc"): Int32Array {
    const own = this.keys(column);
    return ordered(this.found, own, direction === "desc");
  }

  private keys(column: string): ArrayLike<number> {
    if (column === "value") return this.shading;
    if (column.startsWith("sae")) return this.values.of(this.quantity.key, Number(column.slice(3)));
    return placeKeys(this.data, column as "token" | "position" | "count" | "context");
  }

  private shown(value: number): string {
    return this.quantity.share ? percent(value) : shownNumber(value);
  }

  // ---- the table: sorted and filtered here, a page of rows at a time goes to Tabulator

  private columns(): ColumnDefinition[] {
    const values = this.quantity.ofSae ? this.data.saes : [];
    const number: Partial<ColumnDefinition> = {
      hozAlign: "right",
      headerHozAlign: "right",
      headerWordWrap: true,
      headerSortStartingDir: "desc",
      width: 92, // long names of SAEs go on several lines
    };
    const names: Record<number, string> = { [EVERY]: "mean", [LEAST]: "least" };
    const text = (field: string) => ({
      field,
      formatter: (cell: CellComponent) => textCell(cell.getValue()),
    });
    return [
      {
        title: "Token",
        field: "token",
        width: 120,
        formatter: (cell: CellComponent) => {
          const { place, token } = cell.getData();
          return buttonCell(token, `${token}, ${whereabouts(this.data, place)}`, () =>
            this.choose(place, true),
          );
        },
      },
      {
        title: "In context",
        field: "snippet",
        headerSort: false,
        width: 330,
        formatter: (cell: CellComponent) => snippet(this.data, cell.getData().place, 5),
      },
      { title: values.length ? (names[this.sae] ?? "value") : "value", ...text("value"), ...number },
      ...(values.length > 1
        ? values.map(({ name }, i) => ({ title: inline(name), ...text(`sae${i}`), ...number }))
        : []),
      { title: "Occurs", ...text("count"), ...number },
      { title: "Position", ...text("position"), ...number },
      { title: "Context", ...text("context"), ...number },
    ];
  }

  private row(place: number): object {
    const { data } = this;
    const row: Record<string, string | number> = {
      place,
      token: inline(data.token(place)),
      value: this.shown(this.shading[place]),
      count: String(data.counts[data.tokens[place]]),
      position: String(place % data.length),
      context: String(data.contexts[Math.floor(place / data.length)]),
    };
    if (this.quantity.ofSae) {
      data.saes.forEach((_, i) => (row[`sae${i}`] = this.shown(this.values.of(this.quantity.key, i)[place])));
    }
    return row;
  }

  private buildTable(root: HTMLElement): void {
    this.table = new Tabulator(root, {
      layout: "fitDataStretch",
      height: "32rem",
      columns: this.columns(),
      initialSort: [{ column: "value", dir: "desc" }],
      pagination: true,
      paginationMode: "remote",
      sortMode: "remote",
      paginationSize: ROWS_SHOWN,
      ajaxURL: "here", // no request: the next line answers
      ajaxRequestFunc: (_url: string, _config: unknown, wanted: Wanted) => {
        const sorter = wanted.sort?.[0] ?? { field: "value", dir: "desc" };
        const places = this.ranked(sorter.field, sorter.dir);
        const start = ((wanted.page ?? 1) - 1) * ROWS_SHOWN;
        const data = Array.from(places.subarray(start, start + ROWS_SHOWN), (place) => this.row(place));
        return Promise.resolve({ last_page: Math.max(1, Math.ceil(places.length / ROWS_SHOWN)), data });
      },
      placeholder: "No token passes this filter.",
    } as Options);
  }

  // ---- the text

  private showText(): void {
    const { data, found } = this;
    const contexts: number[] = [];
    for (const place of found) {
      const context = Math.floor(place / data.length);
      if (contexts[contexts.length - 1] !== context) contexts.push(context);
    }
    const pages = Math.max(1, Math.ceil(contexts.length / CONTEXTS_SHOWN));
    this.page = Math.min(this.page, pages - 1);
    const isMatch = new Uint8Array(this.shading.length);
    for (const place of found) isMatch[place] = 1;
    const filtered = found.length < this.shading.length && this.isFiltered;
    const [low, high] = this.ends();
    this.legend.replaceChildren(
      `${this.quantity.label}: `,
      element("span", { class: "scale" }, `${this.shown(low)} `, element("i", {}), ` ${this.shown(high)}`),
      "; grey tokens have no value",
      filtered ? "; tokens that pass the filter are underlined" : "",
    );
    const shown = contexts.slice(this.page * CONTEXTS_SHOWN, (this.page + 1) * CONTEXTS_SHOWN);
    this.text.replaceChildren(
      ...shown.map((context) => {
        const start = context * data.length;
        const label = `document ${data.documents[context]}, context ${data.contexts[context]}`;
        const line = element("p", { role: "group", "aria-label": label }, element("small", {}, label));
        for (let place = start; place < start + data.length; place++) {
          line.append(this.tokenSpan(place, low, high, filtered && isMatch[place] === 1));
        }
        return line;
      }),
    );
    this.text.querySelector("span")?.setAttribute("tabindex", "0");
    this.showPages(pages);
  }

  private get isFiltered(): boolean {
    return Object.values(this.inputs).some(({ value }) => value !== "");
  }

  private tokenSpan(place: number, low: number, high: number, isMatch: boolean): HTMLElement {
    const value = this.shading[place];
    const span = element("span", { role: "option", tabindex: "-1", "data-place": String(place) });
    span.textContent = visible(this.data.token(place));
    if (Number.isNaN(value)) span.className = "unmeasured";
    else span.style.setProperty("--v", String(Math.min(1, Math.max(0, (value - low) / (high - low)))));
    if (isMatch) span.classList.add("match");
    if (place === this.chosen) span.setAttribute("aria-selected", "true");
    return span;
  }

  private showPages(pages: number): void {
    const go = (label: string, page: number): HTMLElement => {
      const button = element("button", { type: "button" }, label);
      button.disabled = page < 0 || page >= pages || page === this.page;
      button.addEventListener("click", () => {
        this.page = page;
        this.showText();
      });
      return button;
    };
    const here = `part ${this.page + 1} of ${pages} `;
    this.pages.replaceChildren(here, go("Previous part", this.page - 1), go("Next part", this.page + 1));
  }

  private listen(): void {
    const placeOf = (event: Event): number =>
      Number((event.target as Element).closest<HTMLElement>("[data-place]")?.dataset.place ?? -1);
    this.text.addEventListener("mouseover", (event) => {
      if (placeOf(event) >= 0) this.describe(placeOf(event));
    });
    this.text.addEventListener("mouseleave", () => this.chosen >= 0 && this.describe(this.chosen));
    this.text.addEventListener("click", (event) => placeOf(event) >= 0 && this.mark(placeOf(event)));
    this.text.addEventListener("focusin", (event) => placeOf(event) >= 0 && this.mark(placeOf(event)));
    this.text.addEventListener("keydown", (event) => this.move(event));
  }

  private move(event: KeyboardEvent): void {
    const spans = [...this.text.querySelectorAll<HTMLElement>("[data-place]")];
    const at = spans.indexOf(document.activeElement as HTMLElement);
    const steps: Record<string, number> = {
      ArrowRight: at + 1,
      ArrowLeft: at - 1,
      ArrowDown: at + this.data.length,
      ArrowUp: at - this.data.length,
      Home: 0,
      End: spans.length - 1,
    };
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    spans[Math.min(spans.length - 1, Math.max(0, steps[event.key]))].focus();
  }

  /** Choose a token from elsewhere: its numbers, and its context in the text. */
  choose(place: number, bringToText: boolean): void {
    if (bringToText) {
      const contexts = [...new Set(Array.from(this.found, (own) => Math.floor(own / this.data.length)))];
      const at = contexts.indexOf(Math.floor(place / this.data.length));
      if (at >= 0) this.page = Math.floor(at / CONTEXTS_SHOWN);
      this.showText();
    }
    this.mark(place);
    if (bringToText) this.details.scrollIntoView({ block: "nearest" });
  }

  private mark(place: number): void {
    this.chosen = place;
    for (const span of this.text.querySelectorAll("[aria-selected]")) span.removeAttribute("aria-selected");
    for (const span of this.text.querySelectorAll("[tabindex='0']")) span.setAttribute("tabindex", "-1");
    const span = this.text.querySelector(`[data-place="${place}"]`);
    span?.setAttribute("aria-selected", "true");
    (span ?? this.text.querySelector("span"))?.setAttribute("tabindex", "0");
    this.describe(place);
    const value = this.shading[place];
    const told = Number.isNaN(value) ? "not measured" : `${this.quantity.label}: ${this.shown(value)}`;
    this.status.textContent = `${inline(this.data.token(place))}, ${told}, ${whereabouts(this.data, place)}`;
  }

  // ---- one token

  private describe(place: number): void {
    const { data } = this;
    const count = data.counts[data.tokens[place]];
    const often = count === 1 ? "once" : `${count} times`;
    const facts = [`${whereabouts(data, place)}; occurs ${often} in this text`];
    const isMeasured = !Number.isNaN(this.values.of("x", 0)[place]);
    if (isMeasured) facts.push(`norm of x ${shownNumber(this.values.of("x", 0)[place])}`);
    if (data.has("loss") && !Number.isNaN(data.column("loss")[place]))
      facts.push(`loss ${shownNumber(data.column("loss")[place])}`);
    this.details.replaceChildren(
      element("h5", {}, "Token ", element("bdi", { class: "token" }, inline(data.token(place)))),
      element("p", { class: "small" }, facts.join("; ")),
      element("p", {}, snippet(data, place, 14)),
      isMeasured
        ? element("div", { class: "saes" }, ...data.saes.map((_, sae) => this.inSae(place, sae)))
        : element("p", {}, "This token was left out of the measurement."),
    );
  }

  private inSae(place: number, sae: number): HTMLElement {
    const of = (key: string): number => this.values.of(key, sae)[place];
    const latents = this.data.active(sae, place);
    const strongest = latents[0]?.value ?? 1;
    return element(
      "section",
      { "aria-label": inline(this.data.saes[sae].name) },
      element("h6", {}, visible(this.data.saes[sae].name)),
      element(
        "ul",
        {},
        element("li", {}, "error ", element("b", {}, percent(of("error"))), " of ‖x‖²"),
        element("li", {}, element("b", {}, linearity(this.values, sae, place))),
        element("li", {}, `linear ${percent(of("linear"))}, nonlinear ${percent(of("nonlinear"))} of ‖x‖²`),
        element("li", {}, `L0 ${shownNumber(of("l0"))}`),
        ...(this.data.has(`sae${sae}/kl`) && !Number.isNaN(of("kl"))
          ? [element("li", {}, `KL ${shownNumber(of("kl"))} nats`)]
          : []),
      ),
      element(
        "ol",
        { class: "latents", "aria-label": "strongest latents" },
        ...latents.map(({ latent, value }) => {
          const label = `latent ${latent}, value ${shownNumber(value)}`;
          const button = buttonCell(`${latent}`, label, () => this.openLatent(sae, latent));
          const bar = element("span", { class: "bar" }, shownNumber(value));
          bar.style.setProperty("--v", String(value / strongest));
          return element("li", {}, button, bar);
        }),
      ),
    );
  }
}
