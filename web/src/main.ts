/** Brings the page to life: the static page stands without it. */

import { unpacked } from "./data.ts";
import { element, later } from "./dom.ts";
import { interactive, isDrawable } from "./figures.ts";
import type { Panel } from "./figures.ts";
import { LatentBrowser } from "./latents.ts";
import { TokenExplorer } from "./tokens.ts";

async function explore(section: HTMLElement): Promise<void> {
  const tokens = section.querySelector<HTMLElement>(".tokens")!;
  const latents = section.querySelector<HTMLElement>(".latents-of")!;
  const data = await unpacked(section.querySelector(".packed")!.textContent!);
  const browser = new LatentBrowser(latents, data, (place) => explorer.choose(place, true));
  const explorer = new TokenExplorer(tokens, data, (sae, latent) => browser.open(sae, latent));
  section.dataset.ready = "true";
}

function enliven(figure: HTMLElement): void {
  const panels: Panel[] = JSON.parse(figure.querySelector(".panels-data")!.textContent!);
  if (!isDrawable(panels)) return;
  const picture = figure.querySelector("img")!;
  const still = element("details", {}, element("summary", {}, "the figure as a picture"));
  picture.before(interactive(panels), still);
  still.append(picture);
}

/** Keep the rows of a table that hold what was typed. */
function searchable(input: HTMLInputElement): void {
  const rows = [...input.closest("details")!.querySelectorAll<HTMLElement>("tbody tr")];
  input.addEventListener(
    "input",
    later(() => {
      const wanted = input.value.toLowerCase();
      for (const row of rows) row.hidden = !row.textContent!.toLowerCase().includes(wanted);
    }),
  );
}

function start(): void {
  document.querySelectorAll<HTMLInputElement>("input.search").forEach(searchable);
  document.querySelectorAll<HTMLElement>("figure.drawn").forEach(enliven);
  for (const section of document.querySelectorAll<HTMLElement>("section.explore")) {
    explore(section).catch((error: unknown) => {
      section.prepend(element("p", { class: "failed" }, `This text cannot be shown: ${String(error)}`));
    });
  }
}

// After the first paint: the static page is there at once, however much there is to unpack.
requestAnimationFrame(() => setTimeout(start));
