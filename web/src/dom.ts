/** Elements without markup: text is always text. */

type Child = Node | string;

export function element<Tag extends keyof HTMLElementTagNameMap>(
  tag: Tag,
  attributes: Record<string, string> = {},
  ...children: Child[]
): HTMLElementTagNameMap[Tag] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A labelled choice. */
export function choice(
  label: string,
  options: [value: string, text: string][],
): [HTMLLabelElement, HTMLSelectElement] {
  const select = element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
  return [element("label", {}, `${label} `, select), select];
}

/** A labelled field of text or a number. */
export function field(
  label: string,
  attributes: Record<string, string>,
): [HTMLLabelElement, HTMLInputElement] {
  const input = element("input", attributes);
  return [element("label", {}, `${label} `, input), input];
}

/** Call at most once, this long after the last call. */
export function later(work: () => void, milliseconds = 40): () => void {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = window.setTimeout(work, milliseconds);
  };
}
