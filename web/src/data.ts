/** What a result keeps of its held-out text, as report/payload.py packs it: a JSON head, then columns of numbers. */

export interface Sae {
  name: string;
  d_sae: number;
  hook: string;
  site: number;
  latents_kept: number;
  explained_by?: string;
  explanations?: Record<string, [text: string, score: number | null]>; // latent -> what is said of it
}

/** In how many of the contexts the model was spliced, or why in none. */
export interface Kl {
  contexts?: number;
  absent?: string;
}

interface Head {
  saes: Sae[];
  held_out: number;
  kl: Kl;
  length: number; // L, tokens of a context
  contexts: number[];
  documents: number[];
  vocabulary: string[];
  columns: [name: string, type: ColumnType, count: number][];
}

type ColumnType = "f4" | "i4" | "u2" | "b2"; // b2: the upper half of a float32
export type Column = Float32Array | Int32Array | Uint16Array;

export const TOKEN_LATENTS = 8;
export const LATENT_CONTEXTS = 8;
export const NEAREST = 5;

/** The latents of one SAE that are kept, by row. */
export interface Latents {
  number: Column;
  fired: Column;
  rate: Column;
  mean_value: Column;
  decoder_norm: Column;
  nonlinear_share: Column;
  places: Column; // [K, LATENT_CONTEXTS], -1 for none
  values: Column;
  nearest: Column; // [K, NEAREST] numbers, -1 for none
  cosines: Column;
  rowOf: Map<number, number>; // latent -> row
}

export class Explored {
  readonly saes: Sae[];
  readonly heldOut: number;
  readonly kl: Kl;
  readonly length: number;
  readonly contexts: number[];
  readonly documents: number[];
  readonly vocabulary: string[];
  readonly counts: Int32Array; // of each entry of the vocabulary in the kept text
  private readonly columns = new Map<string, Column>();
  private readonly latentTables = new Map<number, Latents>();

  constructor(buffer: ArrayBuffer) {
    const headLength = new DataView(buffer).getUint32(0, true);
    const head: Head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, headLength)));
    let at = 4 * Math.ceil((4 + headLength) / 4);
    for (const [name, type, count] of head.columns) {
      this.columns.set(name, read(buffer, at, type, count));
      at += 4 * Math.ceil((count * (type === "f4" || type === "i4" ? 4 : 2)) / 4);
    }
    this.saes = head.saes;
    this.heldOut = head.held_out;
    this.kl = head.kl;
    this.length = head.length;
    this.contexts = head.contexts;
    this.documents = head.documents;
    this.vocabulary = head.vocabulary;
    this.counts = new Int32Array(head.vocabulary.length);
    for (const token of this.tokens) this.counts[token]++;
  }

  has(name: string): boolean {
    return this.columns.has(name);
  }

  column(name: string): Column {
    const found = this.columns.get(name);
    if (found === undefined) throw new Error(`no column ${name}`);
    return found;
  }

  get tokens(): Column {
    return this.column("tokens");
  }

  token(place: number): string {
    return this.vocabulary[this.tokens[place]];
  }

  /** Latents active at a place, strongest first. */
  active(sae: number, place: number): { latent: number; value: number }[] {
    const latents = this.column(`sae${sae}/latents`);
    const values = this.column(`sae${sae}/values`);
    const found = [];
    for (let i = place * TOKEN_LATENTS; i < (place + 1) * TOKEN_LATENTS && latents[i] > 0; i++) {
      found.push({ latent: latents[i] - 1, value: values[i] });
    }
    return found;
  }

  latents(sae: number): Latents {
    let found = this.latentTables.get(sae);
    if (found === undefined) {
      const column = (name: string): Column => this.column(`sae${sae}/latent/${name}`);
      const number = column("number");
      found = {
        number,
        fired: column("fired"),
        rate: column("rate"),
        mean_value: column("mean_value"),
        decoder_norm: column("decoder_norm"),
        nonlinear_share: column("nonlinear_share"),
        places: column("places"),
        values: column("values"),
        nearest: column("nearest"),
        cosines: column("cosines"),
        rowOf: new Map(Array.from(number, (latent, row) => [latent, row])),
      };
      this.latentTables.set(sae, found);
    }
    return found;
  }
}

function read(buffer: ArrayBuffer, at: number, type: ColumnType, count: number): Column {
  if (type === "f4") return new Float32Array(buffer, at, count);
  if (type === "i4") return new Int32Array(buffer, at, count);
  const halves = new Uint16Array(buffer, at, count);
  if (type === "u2") return halves;
  const bits = new Uint32Array(count);
  for (let i = 0; i < count; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
}

/** From base64 of gzip, as it stands in the page. */
export async function unpacked(base64: string): Promise<Explored> {
  const binary = atob(base64.trim());
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Explored(await new Response(stream).arrayBuffer());
}
