// tuf-js as it is: no fetcher and no configuration of ours. `fetch.js FOLDER METADATA_URL TARGETS_URL DEVICE MODEL`.
// FOLDER/metadata holds the pinned root.json. Prints what the director assigns; the manifest comes to FOLDER/targets.
import { Updater } from "tuf-js";

const [folder, metadataBaseUrl, targetBaseUrl, device, model] = process.argv.slice(2);
const updater = new Updater({
  metadataDir: `${folder}/metadata`,
  targetDir: `${folder}/targets`,
  metadataBaseUrl,
  targetBaseUrl,
});
await updater.refresh();
const assigned = await updater.getTargetInfo(`assign/${device}/${model}`);
const path = assigned.custom.release;
const release = await updater.getTargetInfo(path);
if (release.length !== assigned.length || release.hashes.sha256 !== assigned.hashes.sha256) {
  throw new Error(`${path}: the director and CI disagree`);
}
const file = await updater.downloadTarget(release);
const unknown = await updater.getTargetInfo(`${model}/no-such-release/default`);
console.log(JSON.stringify({ path, file, sha256: release.hashes.sha256, unknown: unknown === undefined }));
