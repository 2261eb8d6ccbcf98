"use strict";
(() => {
  const token = document.body.dataset.token;
  const at = (id) => document.getElementById(id);
  const said = (line, bad = false) => { at("said").textContent = line; at("said").classList.toggle("bad", bad); };

  // Whatever comes from files and models is set as text, never as HTML.
  const made = (tag, text = "", more = {}) => Object.assign(document.createElement(tag), {textContent: text}, more);
  const cells = (row, values) => { for (const value of values) row.append(value instanceof Node ? value : made("td", String(value ?? ""))); return row; };

  const ask = async (path, value) => {
    const how = {headers: {"X-Regraft-Token": token}};
    if (value !== undefined) Object.assign(how, {method: "POST", body: JSON.stringify(value)});
    if (value !== undefined) how.headers["Content-Type"] = "application/json";
    const answer = await fetch(path, how);
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };
  const attempt = (what) => async (event) => {
    event?.preventDefault?.();
    try { await what(); } catch (error) { said(error.message, true); }
  };

  const number = (value) => value === null ? "" : value.toLocaleString("en");
  const fixed = (value, sign = "") => value === null ? "" : (sign && value >= 0 ? sign : "") + value.toFixed(4);
  const time = (seconds) => seconds < 60 ? `${Math.round(seconds)} s` : `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;

  const marked = new Set();
  const showRuns = (runs) => {
    at("empty").hidden = runs.length > 0;
    at("runs").hidden = runs.length === 0;
    const rows = runs.map((run) => {
      const box = made("input", "", {type: "checkbox", checked: marked.has(run.run), disabled: !run.finished, ariaLabel: `compare ${run.run}`});
      box.addEventListener("change", () => { marked[box.checked ? "add" : "delete"](run.run); at("compare").disabled = marked.size === 0; });
      const page = made("a", run.run, {target: "_blank", rel: "noopener", href: `runs/${encodeURIComponent(run.run)}/report?token=${token}`});
      const stages = Object.keys(run.stages).join(", ");
      const state = run.works ? `running: ${run.works}${stages ? `; done: ${stages}` : ""}` : run.finished ? run.model : `stopped; done: ${stages || "nothing"}`;
      const first = made("td"), name = made("td");
      first.append(box);
      name.append(run.finished ? page : run.run);
      return cells(made("tr"), [first, name, state, number(run.parameters), fixed(run.loss_nats), fixed(run.change_nats, "+"), run.text]);
    });
    const before = document.activeElement?.ariaLabel;
    at("runs").tBodies[0].replaceChildren(...rows);
    if (before?.startsWith("compare ")) [...at("runs").querySelectorAll("input")].find((box) => box.ariaLabel === before)?.focus();
  };

  const compare = async () => {
    const lines = await ask(`api/compare?runs=${encodeURIComponent([...marked].join(","))}`);
    const table = made("table"), head = made("tr"), body = made("tbody"), top = made("thead");
    for (const name of ["run", "model", "parameters", "loss, nats", "against dense", "text"]) head.append(made("th", name, {scope: "col"}));
    top.append(head);
    for (const line of lines)
      body.append(cells(made("tr"), [line.run, line.model, number(line.parameters), fixed(line.loss_nats), fixed(line.change_nats, "+"), line.text]));
    table.append(top, body);
    at("compared").replaceChildren(table);
  };

  // What a job has printed is fetched piece by piece, and added to what is shown.
  const outputs = new Map();
  const output = async (job, place) => {
    const read = outputs.get(job.number) ?? {next: 0, ended: false, busy: false};
    outputs.set(job.number, read);
    if (read.ended || read.busy) return;
    read.busy = true;
    try {
      for (let more = true; more;) {
        const found = await ask(`api/jobs/${job.number}?from=${read.next}`);
        const low = place.scrollHeight - place.scrollTop - place.clientHeight < 8;
        if (found.text) place.append(found.text);
        if (low) place.scrollTop = place.scrollHeight;
        more = found.next > read.next;
        read.next = found.next;
        read.ended = !more && found.job.state !== "running";
      }
    } finally { read.busy = false; }
  };

  const places = new Map();
  const placeOf = (job, parent) => {
    if (!places.has(job.number)) {
      const box = made("div", "", {className: "job"}), title = made("h3"), line = made("p", "", {className: "note"}), text = made("pre", "", {tabIndex: 0});
      const stop = made("button", "Stop", {type: "button"}), again = made("button", "Go on", {type: "button"});
      stop.addEventListener("click", attempt(() => ask(`api/jobs/${job.number}/stop`, {})));
      again.addEventListener("click", attempt(async () => {
        const [, recipe, ...rest] = job.arguments;
        const changes = rest.slice(0, rest.indexOf("--output"));
        await ask("api/runs", {recipe, name: job.title, changes, resume: true});
        await refresh();
      }));
      box.dataset.job = job.number;
      box.append(title, line, text, stop, again);
      places.set(job.number, {box, title, line, text, stop, again});
      if (job.kind === "run") parent.prepend(box); else parent.append(box);
    }
    return places.get(job.number);
  };
  const showJob = (job) => {
    const place = placeOf(job, at(job.kind === "run" ? "jobs" : "answers"));
    const running = job.state === "running";
    place.box.dataset.state = job.state;
    place.title.textContent = `${job.title}: ${job.state}, ${time(job.seconds)}`;
    place.line.textContent = running || job.state !== "done" ? job.line || "starting …" : "";
    place.line.classList.toggle("bad", job.state === "failed");
    place.stop.hidden = !running;
    place.again.hidden = running || job.kind !== "run" || job.state === "done";
    return output(job, place.text);
  };

  const options = (list, names) => { if (list.children.length !== names.length) list.replaceChildren(...names.map((name) => made("option", list.id === "recipe" ? name : "", {value: name}))); };
  const refresh = async () => {
    const state = await ask("api/state");
    options(at("recipe"), state.recipes);
    options(at("models"), state.models);
    showRuns(state.runs);
    await Promise.all([...state.jobs].reverse().map(showJob));
  };

  at("recipe").addEventListener("change", () => { at("name").value = at("recipe").value.replace(/\.ya?ml$/, ""); });
  at("compare").addEventListener("click", attempt(compare));
  at("start").addEventListener("submit", attempt(async () => {
    const changes = at("changes").value.split("\n").map((line) => line.trim()).filter(Boolean);
    const job = await ask("api/runs", {recipe: at("recipe").value, name: at("name").value, changes, resume: false});
    said(`started ${job.title}`);
    await refresh();
  }));
  at("ask").addEventListener("submit", attempt(async () => {
    const models = [at("first").value, at("second").value].filter(Boolean);
    at("answers").replaceChildren();
    await ask("api/prompts", {
      models, prompt: at("prompt").value, tokens: at("tokens").valueAsNumber, temperature: at("temperature").valueAsNumber, plain: at("plain").checked,
    });
    said("both models are being loaded");
    await refresh();
  }));

  const turn = async () => {
    try {
      await refresh();
    } catch (error) {
      said(error instanceof TypeError ? "the studio has ended; what it had started was stopped with it" : error.message, true);
    }
    setTimeout(turn, document.hidden ? 5000 : 1000);
  };
  turn();
})();
