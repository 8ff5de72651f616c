/** Text of models and files, made harmless and readable: nothing in it is markup, turns the line around or hides. */

const NAMED: Record<string, string> = { "\n": "↵\n", "\t": "⇥", "\r": "␍" };

function shown(character: string): string {
  const code = character.codePointAt(0)!;
  if (character in NAMED) return NAMED[character];
  if (code < 0x20) return String.fromCodePoint(0x2400 + code);
  if (code === 0x7f) return "␡";
  return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** A token as it can be read: control, format (bidi, zero width), private and broken characters as their names. */
export function visible(text: string): string {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, shown);
}

/** The same on one line, for tables, labels and announcements; blank tokens are shown too. */
export function inline(text: string): string {
  const line = visible(text).replaceAll("\n", "");
  return line.trim() === "" ? line.replaceAll(" ", "␣") || "(empty)" : line;
}

/** A number with four digits, as people read it. */
export function shownNumber(value: number): string {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

export function percent(share: number): string {
  return Number.isFinite(share)
    ? `${(100 * share).toFixed(share !== 0 && Math.abs(share) < 0.01 ? 2 : 0)} %`
    : "–";
}
