/** The three questions people come with, answered at the top: the hardest token, its largest latents, how linear its error. */

import type { Explored } from "./data.ts";
import { element } from "./dom.ts";
import { LEAST, hardest } from "./select.ts";
import type { Values } from "./select.ts";
import { snippet, whereabouts } from "./snippet.ts";
import { buttonCell } from "./tables.ts";
import { inline, percent, shownNumber, visible } from "./text.ts";

export function glance(
  data: Explored,
  values: Values,
  openToken: (place: number) => void,
  openLatent: (sae: number, latent: number) => void,
): HTMLElement {
  const place = hardest(values);
  if (place < 0) return element("p", {}, "No token of this text was measured.");
  const least = values.of("error", LEAST)[place];
  const best = data.saes.findIndex((_, sae) => values.of("error", sae)[place] === least);
  const several = data.saes.length > 1;
  const token = inline(data.token(place));
  const left = several
    ? `even ${visible(data.saes[best].name)}, best on it, leaves ${percent(least)} of ‖x‖²`
    : `its error is ${percent(least)} of ‖x‖²`;
  const answers: [string, (string | Node)[]][] = [
    [
      several ? "Hardest token for every SAE" : "Hardest token",
      [
        buttonCell(token, `${token}, ${whereabouts(data, place)}`, () => openToken(place)),
        `: ${left}. In `,
        snippet(data, place, 5),
      ],
    ],
    ["Largest latent on it", perSae(data, (sae) => largest(data, sae, place, openLatent))],
    ["Is its error linear?", linearities(data, values, place)],
  ];
  return element(
    "dl",
    { class: "glance" },
    ...answers.flatMap(([question, answer]) => [element("dt", {}, question), element("dd", {}, ...answer)]),
  );
}

function perSae(data: Explored, answer: (sae: number) => (string | Node)[]): (string | Node)[] {
  if (data.saes.length === 1) return answer(0);
  return data.saes.flatMap(({ name }, sae) => [
    element("span", { class: "of-sae" }, `${visible(name)}: `, ...answer(sae)),
    " ",
  ]);
}

function largest(
  data: Explored,
  sae: number,
  place: number,
  openLatent: (sae: number, latent: number) => void,
): (string | Node)[] {
  const [first] = data.active(sae, place);
  if (first === undefined) return ["none is active"];
  const label = `latent ${first.latent} of ${visible(data.saes[sae].name)}`;
  const button = buttonCell(String(first.latent), label, () => openLatent(sae, first.latent));
  return [button, ` at ${shownNumber(first.value)}`];
}

const FEW = 3; // SAEs that are read one by one

function linearities(data: Explored, values: Values, place: number): (string | Node)[] {
  const each = perSae(data, (sae) => [linearity(values, sae, place)]);
  if (data.saes.length <= FEW) return each;
  const shares = data.saes.map((_, sae) => values.of("nonlinear_share", sae)[place]);
  const linear = shares.filter((share) => share <= 0.5).length;
  const range = `${percent(Math.min(...shares))} to ${percent(Math.max(...shares))} nonlinear`;
  return [
    `mostly linear for ${linear} of ${shares.length} SAEs (${range})`,
    element("details", {}, element("summary", {}, "for each SAE"), ...each),
  ];
}

/** In words: what is left of the error without its linear part; above 1 where the map, fitted on other text, misses. */
export function linearity(values: Values, sae: number, place: number): string {
  const share = values.of("nonlinear_share", sae)[place];
  if (Number.isNaN(share)) return "no error";
  if (share > 1) return `not linear (without its linear part ${percent(share)} of it is left)`;
  return `${share > 0.5 ? "mostly nonlinear" : "mostly linear"} (${percent(share)} nonlinear)`;
}
