/** Tabulator with the few modules the page uses, and its habits here: one look, buttons inside cells. */

import {
  AccessorModule,
  AjaxModule,
  ColumnCalcsModule,
  DownloadModule,
  FilterModule,
  FormatModule,
  HtmlTableImportModule,
  InteractionModule,
  PageModule,
  ResizeTableModule,
  SortModule,
  Tabulator,
} from "tabulator-tables";
import { element } from "./dom.ts";

Tabulator.registerModule([
  AccessorModule,
  AjaxModule,
  ColumnCalcsModule,
  DownloadModule,
  FilterModule,
  FormatModule,
  HtmlTableImportModule,
  InteractionModule,
  PageModule,
  ResizeTableModule,
  SortModule,
]);

export { Tabulator };
export type { CellComponent, ColumnDefinition, Options } from "tabulator-tables";

/** A cell that is a button. */
export function buttonCell(text: string, label: string, press: () => void): HTMLElement {
  const button = element("button", { type: "button", class: "link", "aria-label": label }, text);
  button.addEventListener("click", press);
  return button;
}

/** A cell of plain text, whatever it holds. */
export function textCell(text: string): HTMLElement {
  return element("span", {}, text);
}
