// ipywidgets 8 calls MathJax.Hub.Queue, which MathJax 3 no longer has.
document.addEventListener("DOMContentLoaded", () => {
  const M = window.MathJax;
  if (M && !M.Hub) {
    M.Hub = { Queue: (c) => M.typesetPromise && M.typesetPromise([c[2]]) };
  }
});

// Slider handles and the images inside widgets come without a name for screen readers.
const nameWidgets = () => {
  const handles = ".widget-slider .noUi-handle:not([aria-label])";
  document.querySelectorAll(handles).forEach((handle) => {
    const label = handle.closest(".widget-slider").querySelector(".widget-label");
    handle.setAttribute("aria-label", (label && label.textContent) || "slider");
  });
  document.querySelectorAll(".jupyter-widgets img:not([alt])").forEach((image) => {
    image.setAttribute("alt", "plot for the chosen setting");
  });
};
new MutationObserver(nameWidgets).observe(document.documentElement, {
  childList: true,
  subtree: true,
});
