"use strict";
Object.defineProperty(exports, "__esModule", { value: true });
exports.tint = void 0;
const palette = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"];
function tint(node, experts) {
  const spans = node.querySelectorAll("span.token");
  spans.forEach((span, index) => {
    const expert = experts[index];
    if (expert === undefined) {
      return;
    }
    span.style.backgroundColor = palette[expert % palette.length];
    span.title = `expert ${expert}`;
  });
}
exports.tint = tint;
