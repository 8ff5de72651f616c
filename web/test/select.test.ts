import assert from "node:assert/strict";
import test from "node:test";
import { gzipSync } from "node:zlib";
import { Explored, unpacked } from "../src/data.ts";
import {
  EVERY,
  LEAST,
  Values,
  hardest,
  matching,
  ordered,
  placeKeys,
  quantities,
  shadingEnds,
} from "../src/select.ts";

/** Two contexts of three tokens, two SAEs; the first token of each context was not measured. */
function block(): ArrayBuffer {
  const columns: [string, "f4" | "i4" | "u2" | "b2", number[]][] = [
    ["tokens", "u2", [0, 1, 2, 0, 2, 1]],
    ["site0/x", "f4", [NaN, 4, 4, NaN, 4, 16]],
    ["sae0/error", "f4", [NaN, 1, 2, NaN, 4, 4]],
    ["sae0/linear", "f4", [NaN, 0.5, 1, NaN, 3, 1]],
    ["sae0/nonlinear", "f4", [NaN, 0.5, 1, NaN, 1, 3]],
    ["sae0/l0", "u2", [0, 2, 2, 0, 1, 0]],
    ["sae1/error", "f4", [NaN, 3, 2, NaN, 0, 4]],
    ["sae0/kl", "f4", [NaN, 0.25, 0.5, NaN, NaN, NaN]],
    ["sae1/kl", "f4", [NaN, 0.75, 0.25, NaN, NaN, NaN]],
    ["sae0/latents", "u2", [...Array(8).fill(0), 6, 1, ...Array(38).fill(0)]],
    ["sae0/values", "b2", [...Array(8).fill(0), 0x4000, 0x3f80, ...Array(38).fill(0)]],
  ];
  const head = {
    saes: [0, 1].map((i) => ({ name: `s${i}`, d_sae: 8, hook: "h", site: 0, latents_kept: 0 })),
    held_out: 4,
    length: 3,
    contexts: [5, 9],
    documents: [1, 1],
    vocabulary: ["<bos>", " The", "cat"],
    columns: columns.map(([name, type, values]) => [name, type, values.length]),
  };
  const text = new TextEncoder().encode(JSON.stringify(head));
  const parts: Uint8Array[] = [new Uint8Array(new Uint32Array([text.length]).buffer), text];
  const pad = (size: number): Uint8Array => new Uint8Array((4 - (size % 4)) % 4);
  parts.push(pad(text.length));
  for (const [, type, values] of columns) {
    const made =
      type === "f4"
        ? new Float32Array(values)
        : type === "i4"
          ? new Int32Array(values)
          : new Uint16Array(values);
    parts.push(new Uint8Array(made.buffer), pad(made.byteLength));
  }
  return new Uint8Array(parts.flatMap((part) => [...part])).buffer;
}

const NONE = {
  token: "",
  context: "",
  minCount: 0,
  maxCount: Infinity,
  minPosition: 0,
  maxPosition: Infinity,
};

test("a block is read, packed or not", async () => {
  const data = await unpacked(gzipSync(new Uint8Array(block())).toString("base64"));
  assert.deepEqual([...data.tokens], [0, 1, 2, 0, 2, 1]);
  assert.equal(data.token(4), "cat");
  assert.deepEqual([...data.counts], [2, 2, 2]);
  assert.deepEqual(data.active(0, 1), [
    { latent: 5, value: 2 },
    { latent: 0, value: 1 },
  ]);
  assert.deepEqual(data.active(0, 2), []);
  assert.throws(() => data.column("nothing"));
});

test("quantities are of one SAE or the mean over all", () => {
  const data = new Explored(block());
  const values = new Values(data);
  assert.deepEqual([...values.of("error", 0)], [NaN, 0.25, 0.5, NaN, 1, 0.25]);
  assert.deepEqual([...values.of("error", EVERY)], [NaN, 0.5, 0.5, NaN, 0.5, 0.25]);
  assert.deepEqual([...values.of("nonlinear_share", 0)], [NaN, 0.5, 0.5, NaN, 0.25, 0.75]);
  assert.deepEqual([...values.of("x", 0)], [NaN, 2, 2, NaN, 2, 4]);
  assert.deepEqual([...values.of("l0", 0)], [NaN, 2, 2, NaN, 1, 0]);
  assert.ok(!quantities(data).some(({ key }) => key === "loss"));
});

test("filters leave measured tokens that fit, ascending", () => {
  const data = new Explored(block());
  const values = new Values(data).of("error", 0);
  const found = (more: object): number[] => [...matching(data, values, { ...NONE, ...more })];
  assert.deepEqual(found({}), [1, 2, 4, 5]);
  assert.deepEqual(found({ token: "the" }), [1, 5]);
  assert.deepEqual(found({ context: "CAT the" }), [4, 5]);
  assert.deepEqual(found({ context: "dog" }), []);
  assert.deepEqual(found({ minPosition: 2 }), [2, 5]);
  assert.deepEqual(found({ maxPosition: 1 }), [1, 4]);
  assert.deepEqual(found({ minCount: 3 }), []);
});

test("order is that of the numbers, ties by place", () => {
  const keys = [-1.5, 0, 3, -0.25, 3, 1e-30, Infinity];
  const places = Int32Array.from(keys.keys());
  assert.deepEqual([...ordered(places, keys, false)], [0, 3, 1, 5, 2, 4, 6]);
  assert.deepEqual([...ordered(places, keys, true)], [6, 2, 4, 5, 1, 3, 0]);
  assert.deepEqual([...ordered(Int32Array.of(4, 0), keys, false)], [0, 4]);
  const many = Float32Array.from({ length: 5000 }, (_, i) => Math.sin(i) * 10 ** (i % 7));
  const sorted = ordered(Int32Array.from(many.keys()), many, false);
  assert.ok(sorted.every((place, i) => i === 0 || many[sorted[i - 1]] <= many[place]));
});

test("the hardest token for every SAE is where the least error is largest", () => {
  const values = new Values(new Explored(block()));
  assert.deepEqual([...values.of("error", LEAST)], [NaN, 0.25, 0.5, NaN, 0, 0.25]);
  assert.equal(hardest(values), 2);
  const none = new Explored(block());
  none.column("site0/x").fill(NaN);
  assert.equal(hardest(new Values(none)), -1);
});

test("KL is of some contexts, and of the SAEs together too", () => {
  const data = new Explored(block());
  assert.deepEqual(
    quantities(data).map(({ key }) => key),
    ["error", "linear", "nonlinear", "nonlinear_share", "l0", "x", "kl"],
  );
  const values = new Values(data);
  assert.deepEqual([...values.of("kl", EVERY)], [NaN, 0.5, 0.375, NaN, NaN, NaN]);
  const filter = { token: "", context: "", minCount: 0, maxCount: 9, minPosition: 0, maxPosition: 9 };
  assert.deepEqual([...matching(data, values.of("kl", 0), filter)], [1, 2]);
});

test("tokens are sorted by their letters", () => {
  const data = new Explored(block());
  assert.deepEqual([...ordered(Int32Array.of(2, 1, 0), placeKeys(data, "token"), false)], [0, 1, 2]);
  assert.deepEqual([...ordered(Int32Array.of(0, 1, 2, 5), placeKeys(data, "position"), true)], [2, 5, 1, 0]);
});

test("the shading leaves outliers at its ends", () => {
  const [low, high] = shadingEnds(
    Float32Array.from({ length: 1000 }, (_, i) => (i === 999 ? 1e6 : i === 0 ? NaN : i / 1000)),
  );
  assert.ok(low < 0.03 && high > 0.9 && high < 1.01);
  assert.deepEqual(shadingEnds(new Float32Array([NaN])), [0, 1]);
});
