// Bundles src/ with its libraries into darkmatter_ext/report/bundle/, which is committed: installing needs no node.
//   node build.mjs            writes page.js, page.css, LICENSES.txt
//   node build.mjs --check    fails unless what is committed is what would be written
//   node build.mjs --tests    writes the tests as plain JavaScript into build/test/
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const target = join(here, "..", "darkmatter_ext", "report", "bundle");
const shared = { absWorkingDir: here, bundle: true, target: "es2022", logLevel: "warning" };

if (process.argv.includes("--tests")) {
  const entryPoints = readdirSync(join(here, "test")).map((name) => join("test", name));
  await build({
    ...shared,
    entryPoints,
    outdir: "build/test",
    outExtension: { ".js": ".mjs" },
    format: "esm",
    platform: "node",
  });
  process.exit(0);
}

/** A name for the sources: a Python test compares it, so that a bundle made of others is seen without node. */
function sourcesHash() {
  const hash = createHash("sha256");
  const files = [
    "build.mjs",
    "package-lock.json",
    ...readdirSync(join(here, "src")).map((name) => `src/${name}`),
  ];
  for (const file of files.sort())
    hash
      .update(file)
      .update("\0")
      .update(readFileSync(join(here, file)))
      .update("\0");
  return hash.digest("hex");
}

/** The licence of every package that is in the bundle. */
function licences(inputs) {
  const packages = new Set(
    Object.keys(inputs).flatMap((path) => /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(path)?.[1] ?? []),
  );
  return [...packages].sort().map((name) => {
    const folder = join(here, "node_modules", name);
    const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
    const file = readdirSync(folder).find((each) => /^(licen[cs]e|copying)/i.test(each));
    const text = file ? readFileSync(join(folder, file), "utf8").trim() : "(no licence text in the package)";
    return `${name} ${version}, ${license}\n\n${text}\n`;
  });
}

const options = { ...shared, minify: true, write: false, metafile: true, legalComments: "none" };
const script = await build({ ...options, entryPoints: ["src/main.ts"], format: "iife", charset: "ascii" });
const style = await build({ ...options, entryPoints: ["src/page.css"] });
const banner = `/* darkmatter report page; made by web/build.mjs from sources ${sourcesHash()}; licences: LICENSES.txt */\n`;
const inputs = { ...script.metafile.inputs, ...style.metafile.inputs };
const files = {
  "page.js": banner + script.outputFiles[0].text,
  "page.css": banner + style.outputFiles[0].text,
  "LICENSES.txt": licences(inputs).join(`\n${"-".repeat(80)}\n\n`),
};
for (const [name, content] of Object.entries(files)) {
  const path = join(target, name);
  if (!process.argv.includes("--check")) {
    mkdirSync(target, { recursive: true });
    writeFileSync(path, content);
    console.log(`${path} ${Math.round(content.length / 1024)} KB`);
  } else if (!existsSync(path) || readFileSync(path, "utf8") !== content) {
    console.error(`${path} is not what the sources give: npm run build`);
    process.exitCode = 1;
  }
}
