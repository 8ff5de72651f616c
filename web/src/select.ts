/** Quantities of tokens, and which tokens a filter leaves in which order: typed arrays only, fast at 100 000 tokens. */

import type { Column, Explored } from "./data.ts";

export interface Quantity {
  key: string;
  label: string;
  ofSae: boolean;
  share: boolean; // shown as percent
}

const ALL: Quantity[] = [
  { key: "error", label: "error, share of ‖x‖²", ofSae: true, share: true },
  { key: "linear", label: "linear error, share of ‖x‖²", ofSae: true, share: true },
  { key: "nonlinear", label: "nonlinear error, share of ‖x‖²", ofSae: true, share: true },
  { key: "nonlinear_share", label: "nonlinear share of the error", ofSae: true, share: true },
  { key: "l0", label: "L0, active latents", ofSae: true, share: false },
  { key: "x", label: "norm of x", ofSae: false, share: false },
  { key: "kl", label: "KL with Sae(x) for x, nats", ofSae: true, share: false },
  { key: "loss", label: "loss of the model, nats", ofSae: false, share: false },
];

export function quantities(data: Explored): Quantity[] {
  const optional: Record<string, string> = { kl: "sae0/kl", loss: "loss" };
  return ALL.filter(({ key }) => !(key in optional) || data.has(optional[key]));
}

/** Instead of an SAE: the mean over all, and the least of all. What is large at the least is large for every SAE. */
export const EVERY = -1;
export const LEAST = -2;

/** Values of quantities at all places, made once each; NaN where a token was not measured. */
export class Values {
  private readonly made = new Map<string, Float32Array>();

  constructor(private readonly data: Explored) {}

  of(quantity: string, sae: number): Float32Array {
    const key = `${quantity}/${sae}`;
    let found = this.made.get(key);
    if (found === undefined) {
      found = sae < 0 ? this.over(quantity, sae === LEAST) : this.one(quantity, sae);
      this.made.set(key, found);
    }
    return found;
  }

  private over(quantity: string, least: boolean): Float32Array {
    const columns = this.data.saes.map((_, sae) => this.of(quantity, sae));
    return columns[0].map((_, place) => {
      const values = columns.map((column) => column[place]);
      return least ? Math.min(...values) : values.reduce((sum, value) => sum + value, 0) / values.length;
    });
  }

  private one(quantity: string, sae: number): Float32Array {
    const { data } = this;
    const of = (name: string): Column => data.column(`sae${sae}/${name}`);
    const x = data.column(`site${data.saes[sae].site}/x`);
    if (quantity === "loss")
      return Float32Array.from(data.column("loss"), (loss, i) => (x[i] >= 0 ? loss : NaN));
    if (quantity === "kl") return Float32Array.from(of("kl"));
    if (quantity === "x") return Float32Array.from(x, Math.sqrt);
    if (quantity === "l0") return Float32Array.from(of("l0"), (l0, i) => (x[i] >= 0 ? l0 : NaN));
    const over = quantity === "nonlinear_share" ? of("error") : x;
    const part = of(quantity === "nonlinear_share" ? "nonlinear" : quantity);
    return Float32Array.from(part, (value, i) => (over[i] > 0 ? value / over[i] : NaN));
  }
}

/** The place that every SAE fails on most: its least error is largest. -1 where nothing was measured. */
export function hardest(values: Values): number {
  const least = values.of("error", LEAST);
  return least.reduce((best, error, place) => (error > (least[best] ?? -1) ? place : best), -1);
}

/** Where values are weak and where strong: the ends of the shading, few outliers beyond. */
export function shadingEnds(values: Float32Array): [number, number] {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const some = values.filter((value, i) => i % step === 0 && Number.isFinite(value)).sort();
  if (some.length === 0) return [0, 1];
  const at = (share: number): number => some[Math.min(some.length - 1, Math.floor(share * some.length))];
  return [at(0.02), Math.max(at(0.98), at(0.02) + 1e-9)];
}

export interface Filter {
  token: string;
  context: string;
  minCount: number;
  maxCount: number;
  minPosition: number;
  maxPosition: number;
}

/** Places of tokens with a value that pass a filter, ascending. */
export function matching(data: Explored, values: Float32Array, filter: Filter): Int32Array {
  const wanted = wantedTokens(data, filter);
  const contexts = wantedContexts(data, filter.context);
  const found = new Int32Array(values.length);
  let n = 0;
  for (let context = 0; context < data.contexts.length; context++) {
    if (!contexts[context]) continue;
    const last = Math.min(filter.maxPosition, data.length - 1);
    for (let position = Math.max(0, filter.minPosition); position <= last; position++) {
      const place = context * data.length + position;
      if (wanted[data.tokens[place]] && !Number.isNaN(values[place])) found[n++] = place;
    }
  }
  return found.slice(0, n);
}

function wantedTokens(data: Explored, filter: Filter): Uint8Array {
  const text = filter.token.toLowerCase();
  return Uint8Array.from(data.vocabulary, (token, i) => {
    const count = data.counts[i];
    const counts = count >= filter.minCount && count <= filter.maxCount;
    return counts && token.toLowerCase().includes(text) ? 1 : 0;
  });
}

const contextTexts = new WeakMap<Explored, string[]>();

function wantedContexts(data: Explored, text: string): Uint8Array {
  if (text === "") return new Uint8Array(data.contexts.length).fill(1);
  let texts = contextTexts.get(data);
  if (texts === undefined) {
    texts = data.contexts.map((_, context) => contextText(data, context).toLowerCase());
    contextTexts.set(data, texts);
  }
  const wanted = text.toLowerCase();
  return Uint8Array.from(texts, (own) => (own.includes(wanted) ? 1 : 0));
}

function contextText(data: Explored, context: number): string {
  const places = data.tokens.subarray(context * data.length, (context + 1) * data.length);
  return Array.from(places, (token) => data.vocabulary[token]).join("");
}

/**
 * Places in the order of keys [all places]. Each key becomes 32 bits that sort like the number, with the place's 20 below
 * them in one float64: the engine sorts those natively, without a comparison in JavaScript.
 */
export function ordered(places: Int32Array, keys: ArrayLike<number>, falling: boolean): Int32Array {
  const single = new Float32Array(1);
  const bits = new Uint32Array(single.buffer);
  const packed = new Float64Array(places.length);
  for (let i = 0; i < places.length; i++) {
    single[0] = falling ? -keys[places[i]] : keys[places[i]];
    const key = bits[0] & 0x80000000 ? ~bits[0] >>> 0 : (bits[0] | 0x80000000) >>> 0;
    packed[i] = key * 2 ** 20 + i;
  }
  packed.sort();
  return Int32Array.from(packed, (both) => places[both % 2 ** 20]);
}

/** What to sort by besides quantities: [all places] numbers. */
export function placeKeys(
  data: Explored,
  field: "token" | "position" | "count" | "context",
): ArrayLike<number> {
  const { tokens, counts, length } = data;
  if (field === "position") return Float32Array.from(tokens, (_, place) => place % length);
  if (field === "context") return Float32Array.from(tokens, (_, place) => Math.floor(place / length));
  if (field === "count") return Float32Array.from(tokens, (token) => counts[token]);
  const order = data.vocabulary
    .map((_, i) => i)
    .sort((a, b) => compare(data.vocabulary[a], data.vocabulary[b]));
  const rank = new Float32Array(order.length);
  order.forEach((token, i) => (rank[token] = i));
  return Float32Array.from(tokens, (token) => rank[token]);
}

function compare(a: string, b: string): number {
  return a.trim() < b.trim() ? -1 : a.trim() > b.trim() ? 1 : 0;
}
