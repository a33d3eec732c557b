"use strict";
(() => {
  const size = n => { for (const [u, s] of [["T", 2**40], ["G", 2**30], ["M", 2**20], ["K", 2**10]])
    if (n >= s) return (n % s ? (n / s).toFixed(1) : n / s) + u; return n + "B"; };
  const hex = n => "0x" + Math.floor(n / 4096).toString(16) + "000";
  const address = (axis, unit) => { const [a, u] = axis; let i = 1;
    while (i < u.length - 1 && u[i] < unit) i++;
    const part = u[i] > u[i - 1] ? (unit - u[i - 1]) / (u[i] - u[i - 1]) : 0;
    return a[i - 1] + (a[i] - a[i - 1]) * Math.min(Math.max(part, 0), 1); };
  for (const script of document.querySelectorAll("script[type='application/json']")) {
    const data = JSON.parse(script.textContent);
    const svg = document.getElementById(data.picture), read = document.getElementById(data.picture + "-read");
    if (!svg || !read) continue;
    const idle = read.textContent;
    const show = event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = 1 - (event.clientY - box.top) / box.height;
      let text = data.x.name + " " + hex(address(data.x.axis, x * 1000));
      if (data.y) text += ", " + data.y.name + " " + hex(address(data.y.axis, y * 1000));
      if (data.bins) {
        const column = Math.min(Math.floor(x * data.columns), data.columns - 1);
        const parts = data.bins.filter(b => b.bytes[column]).map(b => b.name + " " + size(b.bytes[column]));
        text += ": " + (parts.join(", ") || "nothing here");
      }
      read.textContent = text;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => { read.textContent = idle; });
  }
})();
