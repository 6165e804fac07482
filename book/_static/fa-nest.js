// Keep the theme's icons inside their <i>: ipywidgets' Play button looks for that element.
window.FontAwesomeConfig = { autoReplaceSvg: "nest" };
