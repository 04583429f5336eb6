// The trajectory viewer: one rollout, a decoding step at a time, with what student and teachers predicted.
"use strict";
(function () {
  const root = document.getElementById("viewer");
  const FULL_COLOR = 0.95;  // this share of a rollout's sites is coloured by its divergence, those above are all as dark
  const TRUST = "Trust is the weight of a site in the loss: 1 counts in full, 0 not at all, and below 0 pushes the student away from the target.";
  const COLORS = { order: "reveal order", divergence: "divergence", clip: "clip", trust: "trust" };
  const state = { run: 0, update: null, entry: null, verdict: "all", sort: "logged", color: "divergence", teacher: 0,
    frame: 0, pinned: null };
  let tokens = [], promptTokens = [], frames = [], parts = {};

  function element(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.filter(child => child !== null));
    return node;
  }

  const run = () => DATA.runs[state.run];
  const fits = trace => run().references || state.verdict === "all" || trace.correct === (state.verdict === "right");
  const updates = () => [...new Set(run().traces.filter(fits).map(trace => trace.update))];
  const sum = values => values.reduce((a, b) => a + (b === null ? NaN : b), 0);
  const words = piece => piece === "" ? "\u2205" : piece.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u00b7");

  function rollouts() {
    const found = run().traces.filter(trace => fits(trace) && trace.update === state.update);
    return state.sort === "score" ? [...found].sort((a, b) => b.score - a.score) : found;
  }

  const trace = () => rollouts()[state.entry];

  // What is derived from a trace

  const within = (ranges, position) => {
    for (let i = 0; i < ranges.length; i += 2) if (position >= ranges[i] && position < ranges[i + 1]) return true;
    return false;
  };

  /** The steps of the decoder, the finished completion, and canvases that no decoder saw. */
  function framesOf(one) {
    const steps = Math.max(-1, ...one.reveal_step) + 1, list = [];
    const at = new Map(one.canvases.map((canvas, i) => [canvas.step, i]));
    for (let step = 0; step <= steps; step++) {
      const canvas = one.causal ? (one.canvases.length ? 0 : null) : at.has(step) ? at.get(step) : null;
      list.push({ step, canvas, masked: p => one.reveal_step[p] < 0 || one.reveal_step[p] >= step,
        now: p => one.reveal_step[p] === step,
        label: step < steps ? `step ${step + 1} of ${steps}` : "finished" });
    }
    let number = 0;
    one.canvases.forEach((canvas, i) => {
      if (canvas.step >= 0) return;
      number += 1;
      list.push({ step: -1, canvas: i, masked: p => within(canvas.masked, p), now: () => false, label: `drawn mask ${number}` });
    });
    return list;
  }

  function siteIndex(one) {
    const index = new Map();
    one.sites.forEach(site => {
      if (!index.has(site.position)) index.set(site.position, []);
      index.get(site.position).push(site);
    });
    return index;
  }

  /** The site of a position that a frame shows: its own, else the last one before, else the first. */
  function siteAt(position, frame) {
    const sites = parts.sites.get(position);
    if (!sites) return null;
    const own = sites.find(site => isNow(site, frame));
    if (own || frame.step < 0) return own || null;
    const before = sites.filter(site => site.step >= 0 && site.step < frame.step);
    return before.length ? before[before.length - 1] : sites[0];
  }

  const isNow = (site, frame) => frame.step < 0 ? site.canvas === frame.canvas : site.step === frame.step;

  /** The smallest of the values that at least this share of them does not exceed; 0 of no values. */
  const quantile = (values, share) =>
    values.length ? [...values].sort((a, b) => a - b)[Math.max(0, Math.ceil(share * values.length) - 1)] : 0;

  const clipShare = site => {
    const before = sum(site.divergence), after = sum(site.clipped);
    return before ? Math.min(1, Math.abs(before - after) / Math.abs(before)) : 0;
  };

  const MEASURES = {
    divergence: site => sum(site.divergence),
    clip: clipShare,
    trust: site => sum(site.trust) / Math.max(1, site.trust.length),
  };

  function background(position, site) {
    if (state.color === "order") {
      const step = parts.one.reveal_step[position];
      return step < 0 ? "" : `rgba(${parts.order}, ${(0.12 + 0.68 * step / Math.max(1, parts.last)).toFixed(3)})`;
    }
    if (!site) return "";
    const value = MEASURES[state.color](site);
    if (state.color === "divergence") return `rgba(${parts.heat}, ${(0.85 * Math.sqrt(Math.min(1, Math.max(0, value) / parts.most.divergence))).toFixed(3)})`;
    if (state.color === "clip") return `rgba(${parts.heat}, ${(0.85 * value).toFixed(3)})`;
    const tint = value < 0 ? parts.heat : parts.good;
    return value === 0 ? "" : `rgba(${tint}, ${(0.1 + 0.6 * Math.abs(value) / parts.most.trust).toFixed(3)})`;
  }

  // Building the view of a rollout

  function build() {
    const one = trace();
    parts.body.textContent = "";
    if (!one) { parts.body.append(element("p", {}, "No rollout fits this choice.")); return; }
    frames = framesOf(one);
    state.frame = Math.min(state.frame, frames.length - 1);
    state.pinned = null;
    state.teacher = Math.min(state.teacher, Math.max(0, run().teachers.length - 1));
    const values = one.sites.map(MEASURES.divergence).filter(Number.isFinite);
    const trusts = one.sites.map(site => Math.abs(MEASURES.trust(site))).filter(Number.isFinite);
    Object.assign(parts, { one, sites: siteIndex(one), blamed: one.blamed || [], last: Math.max(...one.reveal_step),
      most: { divergence: Math.max(1e-12, quantile(values, FULL_COLOR) || Math.max(0, ...values)), trust: Math.max(1e-12, ...trusts) } });
    parts.outliers = values.some(value => value > parts.most.divergence);
    colors();
    const slider = element("input", { type: "range", min: 0, max: frames.length - 1, value: state.frame, step: 1,
      "aria-label": "decoding step", oninput: event => go(Number(event.target.value)) });
    Object.assign(parts, { slider, label: element("output", {}), panel: element("div", { class: "site-panel" }),
      legend: element("div", { class: "legend" }) });
    const stepper = element("div", { class: "stepper" },
      element("button", { "aria-label": "one step back", onclick: () => go(state.frame - 1) }, "\u2190"), slider,
      element("button", { "aria-label": "one step on", onclick: () => go(state.frame + 1) }, "\u2192"), parts.label);
    const left = element("div", {}, element("div", { class: "part" }, "Student's prompt"), promptView(one, slider),
      element("div", { class: "part" }, one.causal ? "Completion" : "Canvas as the decoder saw it; dashed: what this step reveals"),
      completion(one), parts.legend);
    parts.body.append(stepper, element("div", { class: "view" }, left, parts.panel, element("div", {}, ...teacherPrompts(one))));
    go(state.frame);
  }

  function tokenNode(one, position, id) {
    const node = element("span", { class: "token", "data-position": position });
    const piece = one.pieces[id];
    node.dataset.text = piece === undefined ? `<${id}>` : words(piece);
    if (parts.sites.has(position)) {
      node.tabIndex = 0;
      node.classList.add("site");
    }
    return node;
  }

  function watch(place) {
    const position = event => {
      const node = event.target.closest(".token");
      return node && node.classList.contains("site") ? Number(node.dataset.position) : null;
    };
    place.addEventListener("mouseover", event => { const p = position(event); if (p !== null && state.pinned === null) show(p); });
    place.addEventListener("focusin", event => { const p = position(event); if (p !== null && state.pinned === null) show(p); });
    place.addEventListener("click", event => {
      const p = position(event);
      if (p === null) return;
      state.pinned = state.pinned === p ? null : p;
      show(p);
    });
    return place;
  }

  /** The prompt as text; single tokens where the method grades the prompt too. */
  function promptView(one) {
    const graded = one.sites.some(site => site.position < 0);
    promptTokens = [];
    if (!graded) return element("div", { class: "tokens prompt" }, one.prompt.map(id => one.pieces[id]).join(""));
    promptTokens = one.prompt.map((id, i) => tokenNode(one, i - one.prompt.length, id));
    return watch(element("div", { class: "tokens prompt" }, ...promptTokens));
  }

  function completion(one) {
    const starts = new Set(one.blocks.slice(1));
    const length = one.causal ? Math.max(...one.reveal_step.map((step, p) => step < 0 ? 0 : p + 1)) : one.tokens.length;
    tokens = one.tokens.slice(0, length).map((id, p) => tokenNode(one, p, id));
    tokens.forEach((node, p) => { if (starts.has(p)) node.classList.add("start"); });
    const place = element("div", { class: "tokens", id: "canvas" });
    tokens.forEach((node, p) => {
      place.append(node);
      if (one.causal && (one.pieces[one.tokens[p]] || "").endsWith("\n") && one.reveal_step[p] >= 0) place.append(element("br"));
    });
    return watch(place);
  }

  /** What each teacher reads instead of the student's prompt; what the student does not read is marked. */
  function teacherPrompts(one) {
    return one.teachers.flatMap((teacher, c) => {
      if (!teacher.prompt) return [];
      const text = teacher.prompt.map(id => one.pieces[id]).join(""), [start, stop] = extra(one, teacher, text);
      return [element("div", { class: "part" }, `Prompt of ${teacherName(c)}; marked: what the student does not read`),
        element("div", { class: "tokens prompt teacher-prompt" }, text.slice(0, start),
          element("mark", {}, text.slice(start, stop)), text.slice(stop)), ...unreadHint(teacher, text)];
    });
  }

  /** The hint as it was written, where the tokens of the prompt do not spell it. */
  function unreadHint(teacher, text) {
    if (!teacher.hint || text.includes(teacher.hint)) return [];
    return [element("div", { class: "part" }, "Its hint as it was written, which the prompt above does not hold word for word"),
      element("div", { class: "tokens prompt written-hint" }, teacher.hint)];
  }

  /** Where the hint stands in a teacher's prompt; else what is left between the parts that both prompts share. */
  function extra(one, teacher, text) {
    const own = one.prompt.map(id => one.pieces[id]).join(""), hint = teacher.hint || "";
    const found = hint ? text.indexOf(hint) : -1;
    if (found >= 0) return [found, found + hint.length];
    let start = 0, stop = text.length, end = own.length;
    while (start < Math.min(stop, end) && text[start] === own[start]) start++;
    while (stop > start && end > start && text[stop - 1] === own[end - 1]) { stop--; end--; }
    return [start, stop];
  }

  const teacherName = c => run().teachers.length > 1 ? `teacher ${c + 1} (${run().teachers[c]})` : `the teacher (${run().teachers[c]})`;

  // One frame

  function go(number) {
    state.frame = Math.max(0, Math.min(frames.length - 1, number));
    const frame = frames[state.frame], one = parts.one;
    parts.slider.value = state.frame;
    parts.label.textContent = frame.label;
    const canvas = frame.canvas === null ? null : one.canvases[frame.canvas];
    const shown = canvas && canvas.shown[state.teacher] || [];
    const paint = (node, position, masked, now) => {
      const seen = masked && within(shown, position), site = siteAt(position, frame);
      const graded = Boolean(site) && isNow(site, frame);
      const unknown = position >= 0 && one.reveal_step[position] < 0;
      let name = "token" + (site ? " site" : "") + (node.classList.contains("start") ? " start" : "");
      if (masked && !now && !seen) name += " masked";
      if (now) name += " now";
      if (seen) name += " shown";
      if (graded) name += " graded";
      if (!masked && within(parts.blamed, position)) name += " blamed";
      if (node.className !== name) node.className = name;
      const text = unknown || (masked && !now && !seen) ? "\u00a0" : node.dataset.text;
      if (node.textContent !== text) node.textContent = text;
      const paper = (masked && !now && !graded) ? "" : background(position, site);
      if (node.style.backgroundColor !== paper) node.style.backgroundColor = paper;
    };
    tokens.forEach((node, p) => paint(node, p, frame.masked(p), frame.now(p)));
    promptTokens.forEach((node, i) => {
      const p = i - one.prompt.length;
      paint(node, p, canvas ? within(canvas.masked, p) : false, false);
    });
    legend(frame, shown.length > 0);
    const graded = one.sites.find(site => isNow(site, frame));
    if (state.pinned !== null) show(state.pinned);
    else if (graded) show(graded.position);
    else describe(frame);
  }

  function legend(frame, sees) {
    const one = parts.one, sample = (name, text) => element("span", {}, element("span", { class: `token ${name}` }, "\u00a0"), ` ${text}`);
    const bar = (from, to, low, high) => element("span", {}, low,
      element("span", { class: "bar", style: `background: linear-gradient(90deg, ${from}, ${to})` }), high);
    parts.legend.textContent = "";
    if (state.color !== "order" && !one.sites.length) parts.legend.append("no graded sites to colour");
    else if (state.color === "order") parts.legend.append(bar(`rgba(${parts.order}, .12)`, `rgba(${parts.order}, .8)`, "first", `step ${parts.last + 1}`));
    else if (state.color === "divergence") parts.legend.append(bar(`rgba(${parts.heat}, 0)`, `rgba(${parts.heat}, .85)`, "divergence 0",
      short(parts.most.divergence) + (parts.outliers ? ` or more (the highest 5 % of the sites)` : "")));
    else if (state.color === "clip") parts.legend.append(bar(`rgba(${parts.heat}, 0)`, `rgba(${parts.heat}, .85)`, "clip removes nothing", "all"));
    else if (state.color === "trust") parts.legend.append(bar(`rgba(${parts.heat}, .7)`, `rgba(${parts.good}, .7)`, `trust ${short(-parts.most.trust)}`, short(parts.most.trust)), element("span", {}, TRUST));
    parts.legend.append(sample("masked", one.causal ? "not generated yet" : "masked"));
    if (sees) parts.legend.append(sample("shown", `masked for the student, seen by ${teacherName(state.teacher)}`));
    if (one.sites.length) parts.legend.append(sample("graded", "graded here"));
    if (parts.blamed.length) parts.legend.append(sample("blamed", "the first wrong step, according to the critique"));
  }

  function describe(frame) {
    const one = parts.one;
    parts.panel.textContent = "";
    const reason = one.gated ? "The gate rejected this rollout, so it is not graded."
      : one.graded === 0 ? "Nothing is graded in this rollout."
      : one.sites.length < one.graded ? `Nothing that is traced is graded here; ${one.sites.length} of ${one.graded} sites are traced.`
      : "Nothing is graded here. Point at a token to see where it was graded.";
    parts.panel.append(element("h3", {}, frame.label), element("p", {}, reason));
  }

  // The numbers of a site

  function show(position) {
    const one = parts.one, site = siteAt(position, frames[state.frame]);
    for (const node of root.querySelectorAll(".chosen")) node.classList.remove("chosen");
    if (!site) { describe(frames[state.frame]); return; }
    const node = position < 0 ? promptTokens[position + one.prompt.length] : tokens[position];
    node.classList.add("chosen");
    const piece = id => one.pieces[id] === undefined ? `<${id}>` : words(one.pieces[id]);
    const where = site.step < 0 ? frames.find(frame => frame.canvas === site.canvas && frame.step < 0).label : `step ${site.step + 1}`;
    const place = position < 0 ? `prompt token ${position + one.prompt.length + 1}` : `position ${position + 1}`;
    parts.panel.textContent = "";
    parts.panel.dataset.position = position;
    parts.panel.append(element("h3", {}, `${place}, ${where}`),
      element("p", {}, "drawn token, bold below: ", element("span", { class: "word drawn" }, piece(site.token))), numbers(site));
    if (within(parts.blamed, position)) parts.panel.append(element("p", { class: "blame" }, "In the first wrong step, according to the critique."));
    parts.panel.append(element("p", { class: "healthy" }, TRUST));
    const names = ["student", ...site.teachers.map((_, c) => teacherName(c))];
    [site.student, ...site.teachers].forEach((one, i) => parts.panel.append(distribution(names[i], one, site.token, piece)));
    if (state.pinned === position) parts.panel.append(element("p", { class: "healthy" }, "Pinned; click the token again to let go."));
  }

  function numbers(site) {
    const row = (name, values, key) => element("tr", {}, element("td", {}, name),
      ...values.map(value => element("td", { "data-number": key }, value === null ? "not finite" : short(value))));
    const head = site.divergence.length > 1 ? element("tr", {}, element("th", {}, "target"),
      ...site.divergence.map((_, t) => element("th", {}, String(t + 1)))) : null;
    return element("table", {}, ...(head ? [head] : []), row("divergence", site.divergence, "divergence"),
      row("after the clip", site.clipped, "clipped"), row("trust", site.trust, "trust"));
  }

  function distribution(name, one, token, piece) {
    const rows = one.top.map(([id, p]) => [id, p]);
    if (!rows.some(([id]) => id === token)) rows.push([token, one.drawn]);
    const body = rows.map(([id, p]) => element("tr", {},
      element("td", { class: id === token ? "word drawn" : "word" }, piece(id)),
      element("td", { class: "share-cell" }, element("span", { class: "share", style: `width: ${(100 * p).toFixed(1)}%` })),
      element("td", { "data-number": id === token ? "drawn" : "top" }, percent(p))));
    return element("table", { "data-of": name }, element("tr", {}, element("th", { colspan: 3 }, name)), ...body);
  }

  const percent = p => p === null ? "" : p >= 0.00005 ? `${(100 * p).toFixed(2)} %` : p === 0 ? "0" : `${(100 * p).toExponential(1)} %`;

  // Controls

  function choice(label, options, value, change) {
    const select = element("select", { "aria-label": label, onchange: event => change(event.target.value) },
      ...options.map(([key, text]) => element("option", { value: key }, text)));
    select.value = String(value);
    return element("label", {}, label, select);
  }

  function controls() {
    const known = updates();
    if (!known.includes(state.update)) state.update = known.length ? known[known.length - 1] : null;
    if (state.entry === null) state.entry = rollouts().findIndex(one => one.sites.length);
    state.entry = Math.max(0, Math.min(state.entry, rollouts().length - 1));
    const redo = key => value => { state[key] = value; state.entry = null; state.frame = 0; render(); };
    const row = element("div", { class: "controls" });
    if (DATA.runs.filter(one => one.traces.length).length > 1)
      row.append(choice("run", DATA.runs.map((one, i) => [i, one.name]), state.run, value => { state.update = null; redo("run")(Number(value)); }));
    row.append(choice("update", known.map(update => [update, update]), state.update, value => redo("update")(Number(value))),
      run().references ? "" : choice("rollouts", [["all", "all"], ["right", "right"], ["wrong", "wrong"]], state.verdict, redo("verdict")),
      choice("order", [["logged", "as logged"], ["score", "by score"]], state.sort, redo("sort")),
      choice("colour", Object.entries(COLORS), state.color, value => { state.color = value; if (parts.one) go(state.frame); }));
    if (run().teachers.length > 1)
      row.append(choice("teacher", run().teachers.map((name, c) => [c, `${c + 1}: ${name}`]), state.teacher,
        value => { state.teacher = Number(value); go(state.frame); }));
    const list = element("div", { class: "rollouts" }, ...rollouts().map((one, i) => element("button", {
      class: run().references ? null : one.correct ? "right" : "wrong", "aria-pressed": i === state.entry,
      onclick: () => { state.entry = i; state.frame = 0; render(); },
    }, `${one.problem}, ${graded(one)}`)));
    return [row, list];
  }

  const graded = one => run().references ? "reference"
    : `attempt ${one.attempt + 1}, score ${short(one.score)}${one.gated ? ", rejected" : ""}`;

  function colors() {
    Object.assign(parts, { order: color("--order"), heat: color("--heat"), good: color("--good") });
  }

  function render() {
    root.textContent = "";
    parts = { body: element("div", {}) };
    const [kept, all] = run().traced_updates;
    root.append(...controls(), parts.body);
    if (kept < all) root.append(element("p", { class: "healthy" }, `The report holds ${kept} of ${all} traced updates; all are in traces.jsonl.`));
    build();
  }

  document.addEventListener("keydown", event => {
    if (!parts.one || !["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = root.contains(event.target), typing = event.target.tagName === "SELECT";
    if (typing || (!inside && event.target !== document.body)) return;
    event.preventDefault();
    const steps = { ArrowLeft: state.frame - 1, ArrowRight: state.frame + 1, Home: 0, End: frames.length - 1 };
    go(steps[event.key]);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (parts.one) { colors(); go(state.frame); } });

  state.run = Math.max(0, DATA.runs.findIndex(one => one.traces.length));
  if (!run().traces.length) root.append(element("p", { class: "missing" }, "No rollouts were traced in this run (log.trace, log.samples)."));
  else render();
})();
