import assert from "node:assert/strict";
import test from "node:test";
import { inline, percent, shownNumber, visible } from "../src/text.ts";

test("what hides or turns a line around is named", () => {
  assert.equal(visible("a\u202eb\u2066c\u200bd\ufeff"), "a⟨U+202E⟩b⟨U+2066⟩c⟨U+200B⟩d⟨U+FEFF⟩");
  assert.equal(visible("\x00\x1b\x7f\x85\ud800"), "␀␛␡⟨U+0085⟩⟨U+D800⟩");
  assert.equal(visible("a\nb\tc"), "a↵\nb⇥c");
  assert.equal(visible(" the é漢🙂 <b>"), " the é漢🙂 <b>");
});

test("on one line, and blank tokens are seen", () => {
  assert.equal(inline("a\nb"), "a↵b");
  assert.equal(inline("  "), "␣␣");
  assert.equal(inline(""), "(empty)");
});

test("numbers have four digits", () => {
  assert.equal(shownNumber(0.123456), "0.1235");
  assert.equal(shownNumber(12345), "12350");
  assert.equal(shownNumber(0.00001234), "1.23e-5");
  assert.equal(shownNumber(0), "0");
  assert.equal(shownNumber(NaN), "–");
  assert.equal(percent(0.256), "26 %");
  assert.equal(percent(0.00256), "0.26 %");
  assert.equal(percent(NaN), "–");
});
