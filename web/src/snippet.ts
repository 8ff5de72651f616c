/** A token between its neighbours. */

import type { Explored } from "./data.ts";
import { element } from "./dom.ts";
import { inline } from "./text.ts";

/** The token at a place marked, with so many tokens at each side. */
export function snippet(data: Explored, place: number, width: number): HTMLElement {
  const start = Math.floor(place / data.length) * data.length;
  const words = (from: number, to: number): string => {
    let text = "";
    for (let i = Math.max(start, from); i < Math.min(start + data.length, to); i++) text += data.token(i);
    return text === "" ? "" : inline(text);
  };
  return element(
    "span",
    { class: "snippet" },
    element("bdi", {}, words(place - width, place)),
    element("mark", {}, inline(data.token(place))),
    element("bdi", {}, words(place + 1, place + 1 + width)),
  );
}

/** Where a place is, in words. */
export function whereabouts(data: Explored, place: number): string {
  const context = Math.floor(place / data.length);
  return `document ${data.documents[context]}, context ${data.contexts[context]}, position ${place % data.length}`;
}
