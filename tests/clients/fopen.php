<?php
// PHP: fopen, which holds chunks back whoever sends them, and so asks in HTTP/1.0; and the spec's rules: fopen.php URL
[$last_id, $retry] = ['', 300];
for (;;) {
    $http = ['protocol_version' => '1.0', 'timeout' => 60, 'header' => $last_id === '' ? [] : ["Last-Event-ID: $last_id"]];
    [$type, $id, $data] = ['message', $last_id, []];
    $stream = @fopen($argv[1], 'r', false, stream_context_create(['http' => $http]));
    while ($stream && ($line = fgets($stream)) !== false && str_ends_with($line, "\n")) {
        $line = substr($line, 0, -1);
        [$field, $value] = explode(':', $line, 2) + [1 => ''];
        $value = preg_replace('/^ /', '', $value);
        if ($field === 'event') $type = $value;
        elseif ($field === 'id') $id = $value;
        elseif ($field === 'data') $data[] = $value;
        elseif ($field === 'retry') $retry = (int) $value;
        elseif ($line === '') {
            $last_id = $id;
            if ($data) echo json_encode(['type' => $type, 'id' => $id, 'data' => implode("\n", $data)]), "\n";
            [$type, $data] = ['message', []];
        }
    }
    echo "{\"end\":true}\n";
    usleep($retry * 1000);
}
