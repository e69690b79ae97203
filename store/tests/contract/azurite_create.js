// Creates a container: the one call that the library under test does not have.
const [port, account, key, container] = process.argv.slice(1);
const date = new Date().toUTCString(), version = "2021-08-06";
const canonical = `PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:${date}\nx-ms-version:${version}\n/${account}/${account}/${container}\nrestype:container`;
const signature = require("crypto").createHmac("sha256", Buffer.from(key, "base64")).update(canonical, "utf8").digest("base64");
const request = require("http").request({ host: "127.0.0.1", port, method: "PUT", path: `/${account}/${container}?restype=container`,
  headers: { "x-ms-date": date, "x-ms-version": version, "content-length": 0, authorization: `SharedKey ${account}:${signature}` } },
  (response) => { response.pipe(process.stderr); process.exitCode = response.statusCode === 201 ? 0 : 1; });
request.end();
