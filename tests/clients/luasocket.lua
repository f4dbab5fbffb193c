-- Lua: LuaSocket, and the spec's rules for reading a stream: luasocket.lua URL
local http, socket = require 'socket.http', require 'socket'
http.TIMEOUT = 60
io.stdout:setvbuf 'line'

local function quoted(text)
  local escapes = { ['\\'] = '\\\\', ['"'] = '\\"', ['\n'] = '\\n', ['\t'] = '\\t' }
  return '"' .. text:gsub('[\\"\n\t]', escapes) .. '"'
end

local url, last_id, retry = arg[1], '', 0.3
while true do
  local rest, kind, id, data = '', 'message', last_id, {}
  local function take(line)
    local field, value = line:match '^([^:]*):? ?(.*)$'
    if field == 'event' then kind = value
    elseif field == 'id' then id = value
    elseif field == 'data' then data[#data + 1] = value
    elseif field == 'retry' then retry = value / 1000
    elseif line == '' then
      last_id = id
      if #data > 0 then
        local text = table.concat(data, '\n')
        print('{"type":' .. quoted(kind) .. ',"id":' .. quoted(id) .. ',"data":' .. quoted(text) .. '}')
      end
      kind, data = 'message', {}
    end
  end
  local function sink(piece)
    rest = rest .. (piece or '')
    rest = rest:gsub('([^\n]*)\n', function(line) take(line) return '' end)
    return 1
  end
  local _, status = http.request { url = url, sink = sink, headers = last_id ~= '' and { ['Last-Event-ID'] = last_id } or {} }
  if type(status) == 'string' then io.stderr:write(status, '\n') end
  print '{"end":true}'
  socket.sleep(retry)
end
