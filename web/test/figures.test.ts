import assert from "node:assert/strict";
import test from "node:test";
import { canBeLog, isDrawable, pointTitle } from "../src/figures.ts";
import type { Panel, Series } from "../src/figures.ts";

const series = (more: Partial<Series>): Series => ({
  kind: "line",
  label: "L0 32",
  colour: "#0072b2",
  x: [1024, 2048],
  y: [0.2, 0.1],
  low: [],
  high: [],
  base: [],
  value: [],
  flat: false,
  ...more,
});

const panel = (own: Series[], more: Partial<Panel> = {}): Panel => ({
  title: "FVU",
  x: { label: "latents", scale: "log", names: [[2048, "2k"]], falling: false, limits: [1000, 3000] },
  y: { label: "fraction", scale: "linear", names: [], falling: false, limits: [0, 1] },
  series: own,
  whole: true,
  ...more,
});

test("a point tells its series, place, value and interval", () => {
  const one = series({ low: [0.15, null], high: [0.25, null] });
  assert.equal(pointTitle(panel([one]), one, 0), "L0 32\nlatents: 1024\nfraction: 0.2\n95 %: 0.15 to 0.25");
  assert.equal(pointTitle(panel([one]), one, 1), "L0 32\nlatents: 2k\nfraction: 0.1");
});

test("a stacked bar tells its own height, a lying one its name", () => {
  const stacked = series({ kind: "bar", base: [0.05, 0] });
  assert.match(pointTitle(panel([stacked]), stacked, 0), /fraction: 0.15$/);
  const lying = series({ kind: "bar", flat: true, x: [0], y: [0.7], base: [0] });
  const names = panel([lying], { y: { ...panel([]).y, label: "", names: [[0, "mean\u202e"]] } });
  assert.equal(pointTitle(names, lying, 0), "L0 32\nat: mean⟨U+202E⟩\nlatents: 0.7");
});

test("only what is whole is drawn again, only what is positive on a logarithmic axis", () => {
  assert.ok(isDrawable([panel([series({})])]));
  assert.ok(!isDrawable([panel([series({})], { whole: false })]));
  assert.ok(!isDrawable([panel([])]));
  assert.ok(canBeLog([panel([series({})])], "x"));
  assert.ok(!canBeLog([panel([series({ y: [0, 1] })])], "y"));
  assert.ok(!canBeLog([panel([series({ kind: "bar" })])], "y"));
});
