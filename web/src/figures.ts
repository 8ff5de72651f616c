/** Interactive copies of the figures, from the data that report/figure_data.py read off them. */

import * as Plot from "@observablehq/plot";
import { element } from "./dom.ts";
import { inline, shownNumber } from "./text.ts";

export interface Axis {
  label: string;
  scale: string;
  names: [place: number, text: string][];
  falling: boolean;
  limits: [low: number, high: number];
}

export interface Series {
  kind: "line" | "point" | "bar" | "area" | "cell" | "level";
  label: string;
  colour: string;
  x: number[];
  y: number[];
  low: (number | null)[];
  high: (number | null)[];
  base: number[];
  value: (number | null)[];
  flat: boolean;
}

export interface Panel {
  title: string;
  x: Axis;
  y: Axis;
  series: Series[];
  whole: boolean;
}

interface Point {
  x: number;
  y: number;
  low: number | null;
  high: number | null;
  base: number;
  value: number | null;
  title: string;
}

const MOST_POINTS = 20000; // of one figure: SVG stays fluid

/** Whether a figure can be drawn again here. */
export function isDrawable(panels: Panel[]): boolean {
  const points = panels.flatMap(({ series }) => series).reduce((sum, { x }) => sum + x.length, 0);
  return (
    points > 0 && points <= MOST_POINTS && panels.every(({ whole, series }) => whole && series.length > 0)
  );
}

/** Whether an axis has only positive values, so that it can be logarithmic. */
export function canBeLog(panels: Panel[], which: "x" | "y"): boolean {
  return panels.every((panel) =>
    panel.series.every((one) => {
      if (one.kind === "bar" || one.kind === "area" || one.kind === "cell") return false;
      return one[which].every((value) => one.kind === "level" || value > 0);
    }),
  );
}

function nameOf(axis: Axis, value: number): string {
  const found = axis.names.find(([place]) => Math.abs(place - value) <= 1e-9 * Math.abs(place));
  return found ? inline(found[1]) : shownNumber(value);
}

export function pointTitle(panel: Panel, series: Series, i: number): string {
  const [across, up] = series.flat ? [panel.y, panel.x] : [panel.x, panel.y];
  const lines = [inline(series.label || panel.title)];
  lines.push(`${across.label || "at"}: ${nameOf(across, nearestName(across, series.x[i]))}`);
  const isStacked = series.base.length > 0 && series.base[i] !== 0;
  const height = isStacked ? series.y[i] - series.base[i] : series.y[i];
  lines.push(`${up.label || "value"}: ${isStacked ? shownNumber(height) : nameOf(up, height)}`);
  if (series.low[i] != null && series.high[i] != null) {
    lines.push(`95 %: ${shownNumber(series.low[i]!)} to ${shownNumber(series.high[i]!)}`);
  }
  if (series.value[i] != null) lines.push(`value: ${shownNumber(series.value[i]!)}`);
  return lines.join("\n");
}

/** Bars of several SAEs stand beside the name they belong to. */
function nearestName(axis: Axis, value: number): number {
  if (axis.scale !== "linear" || axis.names.length === 0) return value;
  const places = axis.names.map(([place]) => place);
  const nearest = places.reduce((best, place) =>
    Math.abs(place - value) < Math.abs(best - value) ? place : best,
  );
  return Math.abs(nearest - value) < 0.5 ? nearest : value;
}

function points(panel: Panel, series: Series): Point[] {
  return series.x.map((x, i) => ({
    x: series.flat ? series.y[i] : x,
    y: series.flat ? x : series.y[i],
    low: series.low[i] ?? null,
    high: series.high[i] ?? null,
    base: series.base[i] ?? 0,
    value: series.value[i] ?? null,
    title: pointTitle(panel, series, i),
  }));
}

function barWidth(panel: Panel): number {
  const places = [...new Set(panel.series.filter(({ kind }) => kind === "bar").flatMap(({ x }) => x))].sort(
    (a, b) => a - b,
  );
  const gaps = places.slice(1).map((place, i) => place - places[i]);
  return 0.8 * (gaps.length ? Math.min(...gaps) : 1);
}

function marks(panel: Panel, series: Series, width: number): Plot.Markish[] {
  const data = points(panel, series);
  const colour = series.colour === "#000000" ? "currentColor" : series.colour;
  if (series.kind === "level") return [Plot.ruleY([series.y[0]], { stroke: colour, strokeDasharray: "3 3" })];
  if (series.kind === "area") return [Plot.areaY(data, { x: "x", y1: "base", y2: "y", fill: colour })];
  if (series.kind === "cell") {
    const box = {
      x1: (d: Point) => d.x - 0.5,
      x2: (d: Point) => d.x + 0.5,
      y1: (d: Point) => d.y - 0.5,
      y2: (d: Point) => d.y + 0.5,
    };
    return [Plot.rect(data, { ...box, fill: "value", inset: 1 })];
  }
  if (series.kind === "bar") {
    const [across, up] = series.flat ? ["y", "x"] : ["x", "y"];
    const box = {
      [`${across}1`]: (d: Point) => (series.flat ? d.y : d.x) - width / 2,
      [`${across}2`]: (d: Point) => (series.flat ? d.y : d.x) + width / 2,
      [`${up}1`]: "base",
      [`${up}2`]: up,
    };
    return [Plot.rect(data, { ...box, fill: colour, inset: 0.5 })];
  }
  const interval = data.filter(({ low, high }) => low !== null && high !== null);
  const fill = series.value.some((value) => value !== null) ? "value" : colour;
  return [
    Plot.ruleX(interval, { x: "x", y1: "low", y2: "high", stroke: colour }),
    ...(series.kind === "line"
      ? [Plot.lineY(data, { x: "x", y: "y", stroke: colour, strokeWidth: 1.4 })]
      : []),
    ...(series.kind === "point" || data.length <= 60
      ? [
          Plot.dot(data, {
            x: "x",
            y: "y",
            fill,
            stroke: fill === "value" ? "currentColor" : colour,
            r: series.kind === "line" ? 2 : 3,
          }),
        ]
      : []),
  ];
}

function scale(axis: Axis, isLog: boolean): object {
  const named = axis.names.length > 0;
  return {
    type: isLog ? "log" : "linear",
    label: axis.label || null,
    ...(isLog === (axis.scale === "log") ? { domain: axis.limits } : {}),
    reverse: axis.falling,
    grid: !named,
    ...(named
      ? {
          ticks: axis.names.map(([place]) => place),
          tickFormat: (place: number) => nameOf(axis, place),
        }
      : {}),
  };
}

/** One panel as SVG. */
export function drawn(panel: Panel, width: number, isLog: { x: boolean; y: boolean }): Element {
  const bar = barWidth(panel);
  const tips = panel.series.filter(({ kind }) => kind !== "level").flatMap((series) => points(panel, series));
  const names = panel.x.names.map(([, text]) => inline(text));
  const isCrowded = names.join("").length * 7 > width;
  const longest = Math.max(0, ...names.map(({ length }) => length));
  const side = Math.max(45, 7 * Math.max(0, ...panel.y.names.map(([, text]) => text.length)) + 20);
  const hasValues = panel.series.some(({ value }) => value.length > 0);
  return Plot.plot({
    width,
    height: Math.max(240, Math.min(340, width * 0.6)) + (isCrowded ? 6 * longest : 0),
    marginLeft: side,
    marginBottom: isCrowded ? 40 + 6 * longest : 45,
    x: { ...scale(panel.x, isLog.x), ...(isCrowded ? { tickRotate: -90 } : {}) },
    y: scale(panel.y, isLog.y),
    color: hasValues ? { scheme: "viridis", legend: true, label: "value" } : undefined,
    ariaLabel: inline(panel.title),
    marks: [
      ...panel.series.flatMap((series) => marks(panel, series, bar)),
      Plot.tip(tips, Plot.pointer({ x: "x", y: "y", title: "title", fill: "var(--paper)", maxRadius: 60 })),
    ],
  });
}

/** A figure: switches, panels, legend. */
export function interactive(panels: Panel[]): HTMLElement {
  const isLog = {
    x: panels.every(({ x }) => x.scale === "log"),
    y: panels.every(({ y }) => y.scale === "log"),
  };
  const body = element("div", { class: "panels" });
  const draw = (): void => {
    const room = Math.max(280, body.clientWidth || 640);
    const width = panels.length > 1 && room >= 720 ? room / 2 - 8 : Math.min(room, 760);
    body.replaceChildren(
      ...panels.map((panel) =>
        element(
          "div",
          { class: "panel" },
          element("h4", {}, inline(panel.title)),
          legend(panel),
          drawn(panel, width, isLog) as HTMLElement,
        ),
      ),
    );
  };
  const switches = (["x", "y"] as const)
    .filter((which) => canBeLog(panels, which))
    .map((which) => {
      const input = element("input", { type: "checkbox" });
      input.checked = isLog[which];
      input.addEventListener("change", () => {
        isLog[which] = input.checked;
        draw();
      });
      return element("label", {}, input, ` logarithmic ${which}`);
    });
  const figure = element(
    "div",
    { class: "interactive" },
    element("p", { class: "controls" }, ...switches),
    body,
  );
  let width = 0;
  new ResizeObserver(() => {
    if (body.clientWidth !== width && body.clientWidth > 0) {
      width = body.clientWidth;
      draw();
    }
  }).observe(body);
  return figure;
}

function legend(panel: Panel): HTMLElement {
  const known = new Map(
    panel.series.filter(({ label }) => label).map(({ label, colour }) => [label, colour]),
  );
  const items = [...known].map(([label, colour]) => {
    const swatch = element("i", { class: "swatch" });
    swatch.style.setProperty("background", colour === "#000000" ? "currentColor" : colour);
    return element("li", {}, swatch, inline(label));
  });
  return element("ul", { class: "legend" }, ...items);
}
