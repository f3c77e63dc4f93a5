// Bundles src/ into the one file that qgraph fills with data.
import { build } from "esbuild";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";

const goal = process.argv[2] ?? "../qgraph/inspection/viewer/viewer.html";
const options = { bundle: true, minify: true, write: false, target: "es2022", charset: "utf8" };
const [script, style] = await Promise.all(
  ["src/main.ts", "src/style.css"].map(async (entry) => {
    const done = await build({ ...options, entryPoints: [entry], legalComments: "inline" });
    return done.outputFiles[0].text;
  }),
);
const page = readFileSync("src/page.html", "utf8")
  .replace("/*style*/", () => style.trim())
  .replace("/*script*/", () => script.trim().replaceAll("</script", "<\\/script"));
mkdirSync(new URL(".", new URL(goal, `file://${process.cwd()}/`)), { recursive: true });
writeFileSync(goal, page);
console.log(`${goal}: ${Math.round(page.length / 1024)} KiB`);
