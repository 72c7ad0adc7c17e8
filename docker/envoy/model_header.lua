-- Sets the header X-Loraplex-Model of a request to the adapter that its path or its JSON body names,
-- for the routes of envoy.yaml. A client that sends the header (our SDK does) saves Envoy from
-- holding the body. Envoy's Lua has no JSON library; this reads no more of the grammar than it needs.

local HEADER = "x-loraplex-model"
-- Where a body may name its adapter, the first one that is there counts.
local PLACES = {"adapter_id", "lora_path", "parameters.adapter_id", "model"}
local MAX_NAME = 256
-- Of quotes and braces: no conversation has so many, and whoever sends more would have all others
-- of this thread wait.
local MAX_MARKS = 100000

-- Returns what a JSON string holds that begins behind `start`, and where its closing quote is.
local function quoted(text, start)
  local i = start + 1
  while true do
    local at = text:find('["\\]', i)
    if not at then return nil, #text end
    if text:sub(at, at) == '"' then return text:sub(start + 1, at - 1), at end
    i = at + 2
  end
end

-- Returns the strings of an object and of objects right in it, by their keys joined by dots.
local function strings(text)
  local found, keys, depth, i = {}, {}, 0, 1
  for _ = 1, MAX_MARKS do
    local at = text:find('[%[%]{}"]', i)
    if not at then return found end
    local char = text:sub(at, at)
    if char == '"' then
      local value
      value, at = quoted(text, at)
      if text:find("^%s*:", at + 1) then
        keys[depth] = value
      elseif value and depth == 1 and keys[1] then
        found[keys[1]] = value
      elseif value and depth == 2 and keys[1] and keys[2] then
        found[keys[1] .. "." .. keys[2]] = value
      end
    elseif char == "{" or char == "[" then
      depth = depth + 1
      keys[depth] = nil
    else
      depth = depth - 1
    end
    i = at + 1
  end
  return {}
end

-- Returns a name as a header may carry it, or nil.
local function plain(name)
  if name == "" or #name > MAX_NAME or name:find("[%c\\\128-\255]") then return nil end
  return name
end

-- Returns the adapter that a JSON body names, or nil.
local function named(text)
  if not text:find("^%s*{") then return nil end
  local found = strings(text)
  for _, place in ipairs(PLACES) do
    local name = found[place]
    if name then return plain((name:gsub("\\/", "/"))) end
  end
  return nil
end

-- Returns the adapter that a call is about, or nil.
local function called(path)
  local name = path:match("^/v1/adapters/([^?]+)")
  if not name or name == "validate" then return nil end
  for _, verb in ipairs({"/prefetch$", "/versions$", "/rollback$"}) do
    name = name:gsub(verb, "")
  end
  return plain((name:gsub("%%(%x%x)", function(byte) return string.char(tonumber(byte, 16)) end)))
end

-- Returns whether a body may say more than the headers do.
local function tells(headers)
  local kind = headers:get("content-type") or ""
  return headers:get(":method") == "POST" and kind:lower():find("^application/json")
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if (headers:get(HEADER) or "") ~= "" then return end
  headers:remove(HEADER)
  local name = called(headers:get(":path") or "")
  if not name and tells(headers) then
    local body = handle:body()
    name = body and named(body:getBytes(0, body:length()))
  end
  if name then
    handle:headers():add(HEADER, name)  -- `headers` is void since the wait for the body
    handle:clearRouteCache()
  end
end
