// Which adapter a request asks for, for the hash of nginx.conf; the request goes on unchanged.

function named(body) {
    const parameters = body.parameters || {};
    return [body.adapter_id, body.lora_path, parameters.adapter_id, body.model].find(
        (name) => typeof name === 'string'
    );
}

function adapter(r) {
    const header = r.headersIn['X-Loraplex-Model'];
    if (header) {
        return header; // Nobody has to parse the body then; our SDK sends it.
    }
    try {
        return named(JSON.parse(r.requestText)) || '';
    } catch (error) {
        return ''; // No JSON, or too much of it: any replica can say what is wrong with it.
    }
}

function route(r) {
    r.variables.adapter = adapter(r);
    const isAny = ['', r.variables.base_model].includes(r.variables.adapter);
    r.internalRedirect(isAny ? '@any' : '@adapter');
}

export default { route };
