{{- define "loraplex.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "loraplex.selector" -}}
app.kubernetes.io/name: loraplex
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.labels" -}}
{{ include "loraplex.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loraplex.keySecret" -}}
{{- .Values.auth.existingSecret | default (ternary (printf "%s-key" (include "loraplex.name" .)) "" (ne .Values.auth.apiKey "")) -}}
{{- end -}}

{{/* A setting as the server's environment spells it; Helm reads whole numbers as floats, and would
     write large ones with an exponent. */}}
{{- define "loraplex.setting" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end -}}
{{- end -}}

{{/* Refuses what could be installed but would not work. */}}
{{- define "loraplex.check" -}}
{{- $several := or .Values.autoscaling.enabled (gt (int .Values.replicas) 1) -}}
{{- $shared := and .Values.sharedStorage.registrySecret .Values.sharedStorage.blobUrl -}}
{{- if and (or .Values.sharedStorage.registrySecret .Values.sharedStorage.blobUrl) (not $shared) -}}
{{- fail "sharedStorage needs both registrySecret and blobUrl: names without files, or files without names, serve nobody" -}}
{{- end -}}
{{- if and $several (not $shared) -}}
{{- fail "several replicas need sharedStorage.registrySecret and sharedStorage.blobUrl: without them an adapter would exist on the one replica that took its upload" -}}
{{- end -}}
{{- if and $several (not (include "loraplex.keySecret" .)) -}}
{{- fail "several replicas need one key: set auth.existingSecret or auth.apiKey" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret .Values.auth.apiKey -}}
{{- fail "set auth.existingSecret or auth.apiKey, not both" -}}
{{- end -}}
{{- end -}}
