/** The latent browser: a table of the latents of an SAE, and one latent's numbers, contexts and neighbours. */

import { LATENT_CONTEXTS, NEAREST } from "./data.ts";
import type { Explored } from "./data.ts";
import { choice, element, field, later } from "./dom.ts";
import { snippet, whereabouts } from "./snippet.ts";
import { Tabulator, buttonCell, textCell } from "./tables.ts";
import type { CellComponent, ColumnDefinition, Options } from "./tables.ts";
import { inline, percent, shownNumber, visible } from "./text.ts";

const ROWS_SHOWN = 20;

interface Row {
  latent: number;
  rate: number;
  mean: number;
  norm: number;
  share: number;
  top: string;
  explanation: string;
  score: number | null;
}

function shownScore(cell: CellComponent): string {
  const score: number | null = cell.getValue();
  return score === null ? "" : shownNumber(score);
}

export class LatentBrowser {
  private sae = 0;
  private table?: Tabulator;
  private readonly details = element("section", { class: "details", "aria-label": "The latent" });
  private readonly note = element("p", { class: "small" });
  private readonly tableRoot = element("div", { class: "latent-table" });
  private readonly select: HTMLSelectElement;
  private readonly search: HTMLInputElement;

  constructor(
    root: HTMLElement,
    private readonly data: Explored,
    private readonly openToken: (place: number) => void,
  ) {
    const saes = data.saes.map(({ name }, i): [string, string] => [String(i), visible(name)]);
    const [saeLabel, select] = choice("SAE", saes);
    const isExplained = data.saes.some(({ explanations }) => explanations !== undefined);
    const [searchLabel, search] = field(
      isExplained ? "Number, top token or explanation" : "Number or top token",
      {
        type: "search",
        size: "14",
      },
    );
    this.select = select;
    this.search = search;
    select.addEventListener("change", () => this.show(Number(select.value)));
    search.addEventListener(
      "input",
      later(() => this.filter()),
    );
    const form = element("form", { class: "controls", "aria-label": "Latents shown" }, saeLabel, searchLabel);
    form.addEventListener("submit", (event) => event.preventDefault());
    root.replaceChildren(form, this.note, element("div", { class: "beside" }, this.tableRoot, this.details));
    this.show(0);
  }

  private show(sae: number): void {
    this.sae = sae;
    this.select.value = String(sae);
    const { name, d_sae, latents_kept, explanations, explained_by } = this.data.saes[sae];
    this.note.textContent =
      `${latents_kept} of the ${d_sae} latents of ${visible(name)}: those that fire most often in the text here. ` +
      "Rate and mean value are of all measured tokens; contexts, and the share of the nonlinear error at a latent's tokens, " +
      "of this text. One token counts for every latent active on it, so shares add up to more than one." +
      (explanations
        ? ` ${Object.keys(explanations).length} are explained by ${visible(explained_by ?? "a file")}.`
        : "");
    const rows = this.rows(sae);
    this.table?.destroy();
    const number: Partial<ColumnDefinition> = {
      hozAlign: "right",
      headerHozAlign: "right",
      headerSortStartingDir: "desc",
      width: 118,
      headerWordWrap: true,
    };
    const explained: ColumnDefinition[] = [
      {
        title: "Explanation",
        field: "explanation",
        width: 220,
        formatter: (cell: CellComponent) => textCell(cell.getValue()),
      },
      { title: "Score", field: "score", formatter: shownScore, sorter: "number", ...number },
    ];
    const shown = (show: (value: number) => string) => (cell: CellComponent) => show(cell.getValue());
    this.table = new Tabulator(this.tableRoot, {
      data: rows,
      index: "latent",
      layout: "fitDataStretch",
      height: "32rem",
      pagination: true,
      paginationSize: ROWS_SHOWN,
      initialSort: [{ column: "share", dir: "desc" }],
      columns: [
        {
          title: "Latent",
          field: "latent",
          width: 90,
          formatter: (cell: CellComponent) => {
            const latent: number = cell.getValue();
            return buttonCell(String(latent), `latent ${latent}`, () => this.open(sae, latent));
          },
        },
        {
          title: "Top token",
          field: "top",
          width: 120,
          formatter: (cell: CellComponent) => element("bdi", {}, cell.getValue()),
        },
        ...(explanations ? explained : []),
        { title: "Nonlinear error here", field: "share", formatter: shown(percent), ...number },
        { title: "Rate", field: "rate", formatter: shown(percent), ...number },
        { title: "Mean value", field: "mean", formatter: shown(shownNumber), ...number },
        { title: "Decoder norm", field: "norm", formatter: shown(shownNumber), ...number },
      ],
      placeholder: "No latent like this.",
    } as Options);
    this.search.value = "";
    const most = rows.reduce<Row | undefined>(
      (best, row) => (best && best.share >= row.share ? best : row),
      undefined,
    );
    if (most) this.describe(most.latent);
  }

  private rows(sae: number): Row[] {
    const own = this.data.latents(sae);
    const said = this.data.saes[sae].explanations ?? {};
    return Array.from(own.number, (latent, row) => ({
      latent,
      explanation: latent in said ? inline(said[latent][0]) : "",
      score: latent in said ? said[latent][1] : null,
      rate: own.rate[row],
      mean: own.mean_value[row],
      norm: own.decoder_norm[row],
      share: own.nonlinear_share[row],
      top:
        own.places[row * LATENT_CONTEXTS] < 0
          ? ""
          : inline(this.data.token(own.places[row * LATENT_CONTEXTS])),
    }));
  }

  private filter(): void {
    const wanted = this.search.value.trim().toLowerCase();
    if (wanted === "") this.table?.clearFilter(true);
    else if (/^\d+$/.test(wanted)) this.table?.setFilter("latent", "=", Number(wanted));
    else {
      this.table?.setFilter(
        (row: Row) =>
          row.top.toLowerCase().includes(wanted) || row.explanation.toLowerCase().includes(wanted),
      );
    }
  }

  /** Show a latent, from anywhere in the page. */
  open(sae: number, latent: number): void {
    if (sae !== this.sae) this.show(sae);
    this.describe(latent);
    this.details.scrollIntoView({ block: "nearest" });
    this.details.focus({ preventScroll: true });
  }

  private describe(latent: number): void {
    const { data, sae } = this;
    const own = data.latents(sae);
    const row = own.rowOf.get(latent);
    const title = element("h4", {}, `Latent ${latent} of ${visible(data.saes[sae].name)}`);
    this.details.tabIndex = -1;
    if (row === undefined) {
      this.details.replaceChildren(
        title,
        element("p", {}, "It is not among the latents kept for this page."),
      );
      return;
    }
    const said = data.saes[sae].explanations?.[latent];
    const facts: [string, string][] = [
      ...(said ? [["explanation", visible(said[0])] as [string, string]] : []),
      ...(said && said[1] !== null ? [["score", shownNumber(said[1])] as [string, string]] : []),
      ["fires on", `${percent(own.rate[row])} of measured tokens, ${own.fired[row]} tokens of this text`],
      ["mean value", `${shownNumber(own.mean_value[row])} where active`],
      ["decoder norm", shownNumber(own.decoder_norm[row])],
      ["nonlinear error", `${percent(own.nonlinear_share[row])} of it is at tokens where this latent fires`],
    ];
    const near = Array.from({ length: NEAREST }, (_, i) => row * NEAREST + i).filter(
      (i) => own.nearest[i] >= 0,
    );
    const places = Array.from({ length: LATENT_CONTEXTS }, (_, i) => row * LATENT_CONTEXTS + i).filter(
      (i) => own.places[i] >= 0,
    );
    this.details.replaceChildren(
      title,
      element(
        "dl",
        {},
        ...facts.flatMap(([name, fact]) => [element("dt", {}, name), element("dd", {}, fact)]),
      ),
      element("h5", {}, "Strongest contexts"),
      element(
        "ol",
        { class: "contexts" },
        ...places.map((i) => {
          const place = own.places[i];
          const label = `value ${shownNumber(own.values[i])}, ${whereabouts(data, place)}`;
          return element(
            "li",
            {},
            buttonCell(shownNumber(own.values[i]), label, () => this.openToken(place)),
            " ",
            snippet(data, place, 10),
          );
        }),
      ),
      element("h5", {}, "Nearest latents, by the cosine of their decoder rows"),
      element(
        "p",
        {},
        ...near.flatMap((i) => {
          const label = `latent ${own.nearest[i]}, cosine ${own.cosines[i].toFixed(2)}`;
          return [
            buttonCell(String(own.nearest[i]), label, () => this.open(sae, own.nearest[i])),
            ` ${own.cosines[i].toFixed(2)}  `,
          ];
        }),
      ),
    );
  }
}
