// Paper is white: a dark page is printed in the colors of a light one.
matchMedia("print").addEventListener("change", ({ matches }) => {
  const page = document.documentElement.dataset;
  if (matches) page.screenTheme = page.theme;
  page.theme = matches ? "light" : page.screenTheme;
});

// What the theme and Markdown leave to be done for readers who use keyboard or ears.
document.addEventListener("DOMContentLoaded", () => {
  // A folded cell is named by its visible words, not by "Toggle hidden content".
  document.querySelectorAll("summary[aria-label]").forEach((summary) => {
    summary.removeAttribute("aria-label");
  });
  // The empty corner of a table is no heading; Markdown cannot say so.
  document.querySelectorAll("article th").forEach((cell) => {
    if (!cell.textContent.trim()) cell.replaceWith(document.createElement("td"));
  });
  // A formula keeps a bracket before it and a stop after it on its line.
  document.querySelectorAll("article span.math").forEach((math) => {
    const { previousSibling: left, nextSibling: right } = math;
    const [before] = /[(\[“]$/.exec(left?.nodeValue ?? "") ?? [""];
    const [after] = /^[.,;:!?)\]”’]+/.exec(right?.nodeValue ?? "") ?? [""];
    if (!before && !after) return;
    const line = document.createElement("span");
    line.style.whiteSpace = "nowrap";
    math.replaceWith(line);
    line.append(before, math, after);
    if (before) left.nodeValue = left.nodeValue.slice(0, -1);
    if (after) right.nodeValue = right.nodeValue.slice(after.length);
  });
  // What a search finds is shown as plain text: a short formula stays, a long one is left
  // out, and a word of the glossary keeps its distance from what explains it.
  if (typeof Search !== "undefined") {
    const plain = Search.htmlToText;
    Search.htmlToText = (html, anchor) => {
      const page = new DOMParser().parseFromString(html, "text/html");
      page.querySelectorAll(".math").forEach((math) => {
        const tex = math.textContent.replace(/^\\[([]|\\[)\]]$/g, "").trim();
        math.replaceWith(/[\\{]/.test(tex) ? "…" : tex);
      });
      page.querySelectorAll("dt").forEach((word) => word.append(": "));
      // A heading or a word alone says nothing: what follows it does.
      const found = anchor && page.querySelector(anchor);
      const bare = found && found.textContent.trim().length < 60;
      if (bare && found.nextElementSibling) found.append(found.nextElementSibling);
      return plain(page.documentElement.outerHTML, anchor);
    };
  }
  // A box that scrolls can be reached by Tab, then scrolled with the arrow keys. The theme
  // sees to code and tables.
  const watch = new ResizeObserver((entries) => {
    entries.forEach(({ target }) => {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    });
  });
  const boxes = "article :is(div.math, .data)";
  document.querySelectorAll(boxes).forEach((box) => watch.observe(box));
});
